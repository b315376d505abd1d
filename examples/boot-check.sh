#!/bin/sh
# Boots a VM from its disks where they are, to see before the migration whether
# it comes up under KVM. The disks are only read: what the guest writes goes to
# a temporary layer (--cow) and is dropped. It has no network, so that nobody
# meets the same machine twice.
#
#   VDDKCP_FLAGS='--server esxi1 --user root --password=+/etc/vddkcp/password --vm moref=12 --snapshot snapshot-7' \
#       boot-check.sh web01 '[ds1] web01/web01.vmdk' '[ds1] web01/web01_1.vmdk'
#
# leaves web01.ppm, the screen after WAIT seconds (120), and web01.log, the
# serial console. The disks are of a VM that is off, or of a snapshot.
#   DISK_IF=virtio                              (ide) for guests that have its drivers
#   ACCEL=tcg                                   (kvm:tcg) where KVM is there and does not work
#   QEMU_FLAGS='-bios /usr/share/ovmf/OVMF.fd'  for guests with UEFI
set -eu
[ $# -ge 2 ] || { echo "usage: $0 NAME DISK..." >&2; exit 2; }
NAME=$1
shift
DISKS=$#
n=0
for disk; do
	shift
	set -- "$@" --export "disk$n=$disk"
	n=$((n + 1))
done
export NAME DISKS
# shellcheck disable=SC2016,SC2086 # the shell of --run has the socket; the flags are words
exec vddkcp export ${VDDKCP_FLAGS-} --cow "$@" --run '
	set --
	while [ $# -lt $((2 * DISKS)) ]; do
		set -- "$@" -drive "file=nbd+unix:///disk$(($# / 2))?socket=$unixsocket,format=raw,if=${DISK_IF:-ide},cache=unsafe,discard=unmap"
	done
	{
		for second in $(seq "${WAIT:-120}"); do
			sleep 1
			kill -0 $$ 2>/dev/null || break # this shell: it was told to end
			echo # has no reader, and ends this, once the guest has powered off
		done
		printf "screendump \"%s\"\nquit\n" "$NAME.ppm"
	} | qemu-system-x86_64 -machine accel="${ACCEL:-kvm:tcg}" -m "${MEMORY_MIB:-2048}" -smp "${CPUS:-2}" \
		-display none -nic none -serial "file:$NAME.log" -monitor stdio "$@" ${QEMU_FLAGS-} >/dev/null'
