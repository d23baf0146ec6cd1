#!/bin/busybox sh
# shellcheck shell=dash
# First program of the guest: mounts the machine's root, read-only, below an overlay that ends with
# the guest; then hands over to the agent.  `settings` names the checkout and what to show of it.
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
# shellcheck disable=SC1091
. /settings

fail() {
    echo "lab: $*"
    sync
    echo c >/proc/sysrq-trigger
}

while read -r module; do
    insmod "/mods/$module" || fail "module $module cannot be loaded"
done </modlist

share() {  # TAG FOLDER OPTIONS
    mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,$3" "$1" "$2" || fail "no share $1"
}
share root /host ro,cache=loose

# The lab's own disks are found by their serial numbers.
for serial in /sys/block/vd*/serial; do
    disk=/dev/$(basename "${serial%/serial}")
    case $(cat "$serial") in
    scratch) mount -t ext4 "$disk" /rw || fail "no scratch disk" ;;
    python) mount -t ext4 -o ro "$disk" /python || fail "no disk with Python" ;;
    esac
done
mkdir -p /rw/upper /rw/work /rw/tmp
chmod 1777 /rw/tmp
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work overlay /new || fail "no root"
# /full shows what private mounts below /new hide, so that a checkout in /tmp can be put back.
mount --bind /new /full

mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mkdir -p /new/dev/shm /new/dev/pts /new/lib/modules
mount -t tmpfs -o mode=1777 tmpfs /new/dev/shm
mount -t devpts devpts /new/dev/pts
mount -t tmpfs -o mode=755 tmpfs /new/run
mkdir -p /new/run/lock /new/run/user
mount --bind /rw/tmp /new/tmp
mount -t debugfs debugfs /new/sys/kernel/debug

mkdir -p "/new$LAB_CHECKOUT"
mount --bind "/full$LAB_CHECKOUT" "/new$LAB_CHECKOUT"
number=0
IFS=:
for folder in $LAB_PYTHON; do
    mount --bind "/python/$number" "/new$folder" || fail "no folder $folder"
    number=$((number + 1))
done
unset IFS
mount --bind "/host$LAB_MODULES" /new/lib/modules || fail "no modules"
if [ -n "$LAB_SHARE" ]; then
    mkdir -p "/new$LAB_SHARE"
    share share "/new$LAB_SHARE" rw,cache=none
fi

hostname lab
ifconfig lo 127.0.0.1 up
# The shell stays as process 1 and reaps what nobody waits for.
exec switch_root /new /bin/sh -c "/usr/bin/python3 -ESs '$LAB_CHECKOUT/tests/vm/agent.py'
echo 'lab: the agent ended'; echo o >/proc/sysrq-trigger; exec sleep 1000"
