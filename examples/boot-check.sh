#!/bin/sh
# Boots a VM in qemu from its disks on the host, to see before a migration whether the
# VM starts under KVM. The disks are only read: the guest's writes go to a temporary
# layer (--cow), which is removed at the end. The guest has no network, so that it can't
# be confused with the original VM.
#
#   VDDKCP_FLAGS='--server esxi1 --user root --password=+/etc/vddkcp/password --vm moref=12 --snapshot snapshot-7' \
#       boot-check.sh web01 '[ds1] web01/web01.vmdk' '[ds1] web01/web01_1.vmdk'
#
# The script writes web01.ppm, the screen after WAIT seconds (120), and web01.log, the
# serial console. The VM must be powered off, or the disks must be those of a snapshot.
# Further variables:
#   DISK_IF=virtio                              for guests with virtio drivers (default: ide)
#   ACCEL=tcg                                   if KVM exists but does not work (default: kvm:tcg)
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
# shellcheck disable=SC2016,SC2086 # the shell of --run expands the variables; the flags are several words
exec vddkcp export ${VDDKCP_FLAGS-} --cow "$@" --run '
	set --
	while [ $# -lt $((2 * DISKS)) ]; do
		set -- "$@" -drive "file=nbd+unix:///disk$(($# / 2))?socket=$unixsocket,format=raw,if=${DISK_IF:-ide},cache=unsafe,discard=unmap"
	done
	{
		for second in $(seq "${WAIT:-120}"); do
			sleep 1
			kill -0 $$ 2>/dev/null || break # this shell has received a signal
			echo # fails, and ends this loop, once the guest has powered off
		done
		printf "screendump \"%s\"\nquit\n" "$NAME.ppm"
	} | qemu-system-x86_64 -machine accel="${ACCEL:-kvm:tcg}" -m "${MEMORY_MIB:-2048}" -smp "${CPUS:-2}" \
		-display none -nic none -serial "file:$NAME.log" -monitor stdio "$@" ${QEMU_FLAGS-} >/dev/null'
