# Every target works in a fresh clone; `make help` lists them.
SHELL := /bin/sh
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
STAMP := .venv/.ready
JOBS ?= auto
# Tests with real programs wait more than they compute: four at a time keep two processors 60 % busy.
# Work is stolen: the tests of a module stay together, and no worker is left with the long ones.
REAL_JOBS ?= 4
# First the tests that prove the pure modules, under coverage; then those that run real programs.
PURE_TESTS := tests/unit tests/property
# Those of the virtual machine that are part of every test run; `make test-vm` runs all.
VM_CORE := $(addprefix tests/vm/guest/test_,volume.py barrier.py helper.py stack.py discards.py \
  era_metadata.py nbd_attach.py systemd.py)
# Those that prove the modules of setup.py.
COMPILED_TESTS := tests/unit/test_compiled.py $(addprefix tests/unit/,gate media nbd predict record) \
  $(addprefix tests/property/test_,mirror.py store.py policy.py direct.py simulate_gate.py)
REAL_TESTS := tests/conformance tests/fault tests/fuzz tests/demo tests/bench
SHELL_SCRIPTS = $$(git ls-files --cached --others --exclude-standard | xargs grep -lsE '^\#!.*(bash|/sh)$$')

# A test run starts thousands of interpreters, and half of a start is compiling what has no bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo demo-failover demo-pair test lint coverage test-walks test-fast test-compiled test-real wheel-compiled bench-cost test-vm test-vm-core mutants-sample bench bench-vm bench-pair bench-points bench-point-traces bench-prediction soak soak-pair mutants fuzz docs install uninstall clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

setup: $(STAMP)  ## install Debian packages (as root) and make .venv; quick when nothing changed

$(STAMP): packages.txt pyproject.toml tools/setup.sh
	./tools/setup.sh
	@touch $@

demo: setup  ## mirror a real file system, kill the daemon in mid-write, recover, compare
	$(PYTHON) examples/demo.py

demo-failover: setup  ## two sites, the first one killed in mid-write: promote, e2fsck, failback, compare
	$(PYTHON) examples/demo_failover.py

demo-pair: setup  ## two appliances, one killed in mid-write, takeover; draws demo-pair.svg
	$(PYTHON) examples/demo_pair.py

test: lint coverage test-walks test-compiled test-real mutants-sample test-vm-core  ## lint, tests, coverage report and its gate; see test-vm

mutants-sample: setup
	$(PYTHON) tools/mutants.py --sample 6

lint: setup  ## ruff, mypy --strict, import contracts, shellcheck
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict bitmapd dmctl
	.venv/bin/lint-imports
	shellcheck $(SHELL_SCRIPTS)

coverage: setup  ## unit and property tests, coverage report, gate on the pure modules
	$(PYTHON) -m coverage erase --rcfile=tools/coverage.ini
	EXAMPLES_PART=$(or $(EXAMPLES_PART),3) $(PYTHON) -m coverage run --rcfile=tools/coverage.ini \
	  -m pytest -n $(JOBS) --durations=10 -m 'not walk' $(PURE_TESTS)
	@$(PYTHON) -m coverage combine --rcfile=tools/coverage.ini --quiet
	@rm -f .coverage.*  # what is left is of processes that a test killed in mid-write
	@$(PYTHON) -m coverage report --rcfile=tools/coverage.ini
	@$(PYTHON) tools/pure_gate.py

test-walks: setup  ## property tests of many simulated steps, which coverage would slow down 2.4 times
	$(PYTEST) -n $(JOBS) -m walk tests/property

test-fast: setup  ## unit and property tests with a tenth of the examples and without walks; with lint about two minutes
	EXAMPLES_PART=10 $(PYTEST) -n $(JOBS) -m 'not walk' $(PURE_TESTS)

test-real: setup  ## foreign clients and servers, faults, fuzzing, demo and benchmark smoke
	$(PYTEST) -n $(REAL_JOBS) --dist worksteal --durations=20 $(wildcard $(REAL_TESTS))

test-vm-core: setup  ## the part of test-vm that make test runs
	$(PYTHON) -m tests.vm.lab pytest -- -m 'not long' $(VM_CORE)

test-vm: setup  ## in a virtual machine with Debian's kernel: device-mapper, power cuts; VM_ARGS="-k x"
	$(PYTHON) -m tests.vm.lab pytest -- $(VM_ARGS)
	$(PYTEST) --durations=20 tests/vm $(VM_ARGS) || [ $$? -eq 5 ]  # 5: VM_ARGS chose none of these

bench: build/compiled/.ready  ## side by side with nbdkit, qemu-nbd, nbdcopy, dd; writes docs/benchmarks.md
	$(PYTHON) -m tests.bench.bench --compiled build/compiled $(BENCH_ARGS)

bench-vm: setup  ## beside md, dm-mirror, DRBD in a virtual machine; BENCH_ARGS=--quick
	$(PYTHON) -m tests.bench.vm.bench_vm $(BENCH_ARGS)

bench-pair: setup  ## two appliances beside one and a bare echo; writes docs/benchmarks-pair.md
	$(PYTHON) -m tests.bench.pair $(BENCH_ARGS)

bench-points: setup  ## points beside a plain secondary, the link, failback; writes docs/benchmarks-points.md
	$(PYTHON) -m tests.bench.points $(BENCH_ARGS)

bench-point-traces: setup  ## what points cost on the recorded traces, counted in simulated time; TRACES="more.csv.gz"
	$(PYTHON) -m tests.bench.pointtraces --traces $(TRACES)

bench-prediction: setup  ## updates of every policy on the recorded traces; TRACES="more.csv.gz"
	$(PYTHON) -m tests.bench.prediction $(TRACES)

soak: setup  ## long property tests and walks, file systems, kill -9; CYCLES=, EXAMPLES=, STEPS=, PAIR_STEPS=, POINTS_STEPS=, FAILOVER_ROUNDS=, GROUP_ROUNDS=
	STATEFUL_EXAMPLES=$(or $(EXAMPLES),1200) $(PYTEST) -n $(JOBS) --timeout 3600 tests/property
	$(PYTHON) -m tests.soak.walks --steps $(or $(STEPS),2000000)
	$(PYTHON) -m tests.soak.pairwalks --steps $(or $(PAIR_STEPS),20000000)
	$(PYTHON) -m tests.soak.points --steps $(or $(POINTS_STEPS),500000)
	$(PYTEST) --timeout 900 tests/soak
	$(PYTHON) -m tests.soak.soak --cycles $(or $(CYCLES),200)
	$(PYTHON) -m tests.soak.failover --rounds $(or $(FAILOVER_ROUNDS),100)
	$(PYTHON) -m tests.soak.group --rounds $(or $(GROUP_ROUNDS),100)
	$(PYTHON) -m tests.soak.late --seconds $(or $(LATE_SECONDS),3600)

soak-pair: setup  ## two appliances under a nemesis, and millions of simulated steps; ROUNDS=500
	$(PYTHON) -m tests.soak.pair --jobs 2 --rounds $(or $(ROUNDS),500)

wheel-compiled: setup  ## dist/dmctl-*.whl with the modules that requests pass through compiled (needs gcc)
	rm -rf build
	DMCTL_COMPILED=1 $(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps \
	  --no-build-isolation --wheel-dir dist .

build/compiled/.ready: $(STAMP) setup.py $(shell git ls-files bitmapd)
	rm -rf build
	mkdir -p build/compiled
	cp -r bitmapd dmctl pyproject.toml setup.py README.md build/compiled
	cd build/compiled && DMCTL_COMPILED=1 ../../$(PYTHON) setup.py --quiet build_ext --inplace
	@touch $@

test-compiled: build/compiled/.ready  ## the tests of these modules once more, over the compiled ones
	rm -rf build/compiled/tests
	cp -r tests build/compiled
	cd build/compiled && PYTHONPATH=$$PWD EXPECT_COMPILED=1 EXAMPLES_PART=$(or $(EXAMPLES_PART),2) \
	  ../../$(PYTEST) -n $(JOBS) -m 'not interpreted' $(COMPILED_TESTS)

bench-cost: build/compiled/.ready  ## processor time a request beside nbdkit, interpreted and compiled; writes docs/benchmarks-cost.md
	$(PYTHON) -m tests.bench.cost --compiled build/compiled $(BENCH_ARGS)

mutants: setup  ## break the code in chosen places, each has to be noticed; MUTANTS="--sample 8"
	$(PYTHON) tools/mutants.py $(MUTANTS)

fuzz: setup  ## a longer run of the fuzz tests; EXAMPLES=20000
	FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(PYTEST) --timeout 3600 tests/fuzz

docs: setup  ## generate the man pages into docs/man, and docs/events.md
	$(PYTHON) docs/make_man.py

install: setup  ## install programs, units, rules, man pages, completion; PREFIX=/usr/local DESTDIR=
	PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" ./tools/install.sh

uninstall:  ## remove what install has put in place; the configuration stays
	PREFIX="$(PREFIX)" DESTDIR="$(DESTDIR)" ./tools/install.sh --remove

clean:  ## remove what the other targets made
	rm -rf .venv .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache build dist *.egg-info demo-run demo-failover-run demo-pair-run demo-pair.svg docs/man/*.[578]
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
