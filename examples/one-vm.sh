#!/bin/sh
# Copies the disks of one VM into a folder, as qcow2, each until it is whole.
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
	# 75 is what may pass: --resume goes on where the copy stopped, and starts
	# one that never began.
	# shellcheck disable=SC2086 # the flags are words
	until vddkcp ${VDDKCP_FLAGS-} --resume --verify --report "$dir/$name.json" "$disk" "$dir/$name.qcow2"; do
		status=$?
		tries=$((tries - 1))
		[ $status = 75 ] && [ $tries -gt 0 ] || exit $status
		sleep 60
	done
done
