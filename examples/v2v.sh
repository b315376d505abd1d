#!/bin/sh
# Converts a VM with virt-v2v, which reads the VM's disks from vddkcp export: they
# are served read-only, and virt-v2v keeps what it changes beside its copy.
#
#   VDDKCP_FLAGS='--server esxi1 --user root --password=+/etc/vddkcp/password --vm moref=12' \
#   V2V_FLAGS='-o local -os /images -of qcow2' \
#       v2v.sh web01 '[ds1] web01/web01.vmdk' '[ds1] web01/web01_1.vmdk'
#
# From 2.12 on virt-v2v takes disks by NBD URIs (-i disk nbd+unix://...). An older
# one takes them from a domain of libvirt's, and only by ports of localhost:
# while it runs, every user of this machine can read the disks there.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 NAME DISK..." >&2; exit 2; }
name=$1
shift
version=$(virt-v2v --version | sed 's/^virt-v2v \([0-9.]*[0-9]\).*/\1/')
takes_uris() { printf '%s\n' 2.12 "$version" | sort -CV; }

dir=$(mktemp -d)
servers=
# shellcheck disable=SC2086 # process ids and flags are words
trap '[ -z "$servers" ] || kill $servers 2>/dev/null || :; wait; rm -rf "$dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Each disk has a server, which says its URI when clients can come. One that
# can't open its disk says why, and ends without a URI.
for disk; do
	shift
	uris=$(mktemp -u "$dir/XXXXXX") # its own: the servers before have theirs open
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
	{ # memory in KiB: virt-v2v 2.2 takes it for that, whatever its unit
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
