#!/bin/sh
# Converts a VM with virt-v2v, which reads the VM's disks from vddkcp export. The disks
# are served read-only, and virt-v2v stores its changes in layers of its own.
#
#   VDDKCP_FLAGS='--server esxi1 --user root --password=+/etc/vddkcp/password --vm moref=12' \
#   V2V_FLAGS='-o local -os /images -of qcow2' \
#       v2v.sh web01 '[ds1] web01/web01.vmdk' '[ds1] web01/web01_1.vmdk'
#
# virt-v2v 2.12 and later accepts NBD URIs (-i disk nbd+unix://...). Older versions accept
# NBD disks only in a libvirt domain, and only on TCP ports of localhost. While such a
# version runs, every user of this machine can read the disks there.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 NAME DISK..." >&2; exit 2; }
name=$1
shift
version=$(virt-v2v --version | sed 's/^virt-v2v \([0-9.]*[0-9]\).*/\1/')
takes_uris() { printf '%s\n' 2.12 "$version" | sort -CV; }

dir=$(mktemp -d)
servers=
# shellcheck disable=SC2086 # process ids and flags are several words
trap '[ -z "$servers" ] || kill $servers 2>/dev/null || :; wait; rm -rf "$dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Each disk has a server of its own, which prints its URI when clients can connect. A
# server that can't open its disk prints the reason and ends without a URI.
for disk; do
	shift
	uris=$(mktemp -u "$dir/XXXXXX") # a FIFO of its own: the earlier servers still have theirs open
	mkfifo "$uris"
	listen=tcp://127.0.0.1:0
	if takes_uris; then listen=unix:$(mktemp -u "$dir/XXXXXX"); fi
	# shellcheck disable=SC2086
	vddkcp export ${VDDKCP_FLAGS-} --listen "$listen" --exit-with-parent -- "$disk" >"$uris" &
	servers="$servers $!"
	read -r uri <"$uris" || exit 1
	set -- "$@" "$uri"
done

if ! takes_uris; then
	{ # memory in KiB, because virt-v2v 2.2 ignores the unit
		echo "<domain type='vmware'><name>guest</name><memory unit='KiB'>2097152</memory><vcpu>1</vcpu>"
		echo "<os><type arch='x86_64'>hvm</type></os><features><acpi/><apic/></features><devices>"
		device=a
		for uri; do
			port=${uri##*:}
			echo "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd'>"
			echo "<host name='localhost' port='$port'/></source><target dev='sd$device' bus='scsi'/></disk>"
			device=$(echo "$device" | tr a-y b-z)
		done
		echo "</devices></domain>"
	} >"$dir/guest.xml"
	set -- "$dir/guest.xml"
fi
if takes_uris; then input=disk; else input=libvirtxml; fi
# shellcheck disable=SC2086
virt-v2v -i $input "$@" -on "$name" ${V2V_FLAGS--o local -os .}
