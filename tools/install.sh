#!/bin/sh
# Install dmctl and bitmapd for the whole machine, or with --remove take them away again.
#   PREFIX   where everything goes but the configuration (default /usr/local)
#   DESTDIR  a folder to stage into, for packagers; nothing outside it is touched
# Doing it twice is the same as doing it once.  The configuration in /etc/dmctl is never removed.
set -eu

PREFIX=${PREFIX:-/usr/local}
DESTDIR=${DESTDIR:-}
cd "$(dirname "$0")/.."

case $PREFIX in
/*) ;;
*)
    echo "install: PREFIX=$PREFIX is not an absolute path" >&2
    exit 2
    ;;
esac

home=$DESTDIR$PREFIX/lib/dmctl
bin=$DESTDIR$PREFIX/bin
units=$DESTDIR$PREFIX/lib/systemd/system
rules=$DESTDIR$PREFIX/lib/udev/rules.d
modules=$DESTDIR$PREFIX/lib/modules-load.d
man=$DESTDIR$PREFIX/share/man
bash_completion=$DESTDIR$PREFIX/share/bash-completion/completions
zsh_completion=$DESTDIR$PREFIX/share/zsh/site-functions
doc=$DESTDIR$PREFIX/share/doc/dmctl
agents=$DESTDIR/usr/lib/ocf/resource.d/dmctl # where Pacemaker looks, whatever the prefix

# Have what runs on this machine look at what has changed.
reload() {
    [ -z "$DESTDIR" ] || return 0
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
    if [ -e /run/udev/control ]; then udevadm control --reload; fi
}

if [ "${1:-}" = --remove ]; then
    rm -rf "$home" "$doc" "$agents"
    rm -f "$bin/dmctl" "$bin/bitmapd" "$bin/dmctl-fence-pacemaker" "$modules/dmctl.conf" \
        "$bash_completion/dmctl" "$zsh_completion/_dmctl" \
        "$man/man8/dmctl.8" "$man/man8/bitmapd.8" "$man/man5/dmctl.toml.5" "$man/man7/dmctl-events.7"
    for unit in examples/*.service examples/*.timer; do rm -f "$units/${unit##*/}"; done
    for file in udev/*.rules; do rm -f "$rules/${file##*/}"; done
    reload
    echo "removed from $DESTDIR$PREFIX; the configuration in $DESTDIR/etc/dmctl is kept"
    exit 0
fi

# The programs have an environment of their own, so that no other Python package can break them.  It
# is made beside the old one, which serves running volumes until the new one is whole.
rm -rf "$home.new" build
/usr/bin/python3 -m venv "$home.new"
"$home.new/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile '.[metrics]'
rm -rf build "$home.new"/bin/activate* "$home.new"/bin/Activate* "$home.new"/bin/pip*
"$home.new/bin/python" -m compileall -q -s "$home.new" -p "$PREFIX/lib/dmctl" "$home.new/lib"
sed -i "s|$home.new|$PREFIX/lib/dmctl|" "$home.new/pyvenv.cfg" "$home.new"/bin/dmctl \
    "$home.new"/bin/bitmapd
rm -rf "$home"
mv "$home.new" "$home"
mkdir -p "$bin"
for program in dmctl bitmapd; do ln -sf "$PREFIX/lib/dmctl/bin/$program" "$bin/$program"; done

# place MODE FOLDER FILE...: a file that names the programs names them where they are.
place() {
    mode=$1
    folder=$2
    shift 2
    mkdir -p "$folder"
    for file; do
        target=$folder/${file##*/}
        sed "s|/usr/local/bin/|$PREFIX/bin/|g" "$file" >"$target.new"
        chmod "$mode" "$target.new"
        mv -f "$target.new" "$target"
    done
}

place 644 "$units" examples/*.service examples/*.timer
place 644 "$rules" udev/*.rules
place 755 "$agents" examples/ocf/volume
place 755 "$bin" examples/ocf/dmctl-fence-pacemaker
place 644 "$modules" examples/dmctl.modules
mv -f "$modules/dmctl.modules" "$modules/dmctl.conf"
place 644 "$doc/examples" examples/dmctl-resync.cron examples/dmctl.toml examples/volumes/*.toml
place 644 "$doc/docs" docs/*.md # hints name pages as docs/NAME.md
place 644 "$doc/docs/decisions" docs/decisions/*.md

pages=$(mktemp -d)
trap 'rm -rf "$pages"' EXIT
.venv/bin/python docs/make_man.py "$pages" >/dev/null
place 644 "$man/man8" "$pages"/*.8
place 644 "$man/man5" "$pages"/*.5
place 644 "$man/man7" "$pages"/*.7
.venv/bin/dmctl --print-completion bash >"$pages/dmctl"
.venv/bin/dmctl --print-completion zsh >"$pages/_dmctl"
place 644 "$bash_completion" "$pages/dmctl"
place 644 "$zsh_completion" "$pages/_dmctl"

mkdir -p "$DESTDIR/etc/dmctl/volumes"
reload
echo "installed below $DESTDIR$PREFIX; volumes are configured in $DESTDIR/etc/dmctl"
if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
    echo "to have volumes start at boot, and resynced regularly:"
    echo "    systemctl enable --now dmctl-assemble.service dmctl-resync.timer"
fi
