#!/bin/sh
# Copies the disks of one VM into a folder as qcow2, and repeats each copy until it is
# complete.
#
#   VDDKCP_FLAGS='--server esxi1 --user root --password=+/etc/vddkcp/password --vm moref=12' \
#       one-vm.sh /images '[ds1] web01/web01.vmdk' '[ds1] web01/web01_1.vmdk'
set -eu
[ $# -ge 2 ] || { echo "usage: $0 DIR DISK..." >&2; exit 2; }
dir=$1
shift
for disk; do
	name=$(basename "$disk" .vmdk)
	tries=5
	# Exit status 75 means that a later run can succeed. --resume continues where the copy
	# stopped, and also starts a copy that has not begun.
	# shellcheck disable=SC2086 # the flags are several words
	until vddkcp ${VDDKCP_FLAGS-} --resume --verify --report "$dir/$name.json" "$disk" "$dir/$name.qcow2"; do
		status=$?
		tries=$((tries - 1))
		[ $status = 75 ] && [ $tries -gt 0 ] || exit $status
		sleep 60
	done
done
