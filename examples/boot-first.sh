#!/bin/sh
# Starts a guest in QEMU within seconds from a disk that is still on its server, and copies
# the disk behind the running guest. vddkcp export serves the disk, which is only read.
# IMAGE is a qcow2 file that takes the writes of the guest, and into which QEMU copies
# everything else. At the end, IMAGE is complete and needs no server.
#
#   VDDKCP_FLAGS='--profile vc1' boot-first.sh vm:web01 /images/web01.qcow2
#
# The VM on the server must be powered off and stay off: its disk is read as it was when
# the script was started first, and whatever is written there later is not copied.
#
# If the export dies, it is started again. Meanwhile the guest waits for its disk, and is
# paused after DELAY seconds. If the script or the machine stops, run the script again with
# the same arguments: it continues with IMAGE. It does so only from the same content of the
# disk, which the file IMAGE.pin identifies.
#
# Variables, with their defaults:
#   DEVICE=ide-hd       the disk of the guest; virtio-blk-pci is faster and needs a driver
#   ACCEL=kvm:tcg MEMORY_MIB=2048 CPUS=2
#   QEMU_FLAGS=         more flags, such as '-bios /usr/share/ovmf/OVMF.fd -vnc :1'
#   SPEED=0             limit of the copy, in bytes per second; 0 means none
#   DELAY=30            seconds until the guest is paused if the export is away
#   RESTARTS=3          how often an export that dies within a minute is started again
set -eu
[ $# = 2 ] || { echo "usage: $0 SRC IMAGE" >&2; exit 2; }
SRC=$1
case $2 in
/*) IMAGE=$2 ;;
*) IMAGE=$PWD/$2 ;;
esac
case $IMAGE in
*[\"\\,]*) echo "$0: the name of IMAGE must have no quotation mark, backslash or comma: $IMAGE" >&2; exit 2 ;;
esac
SOCKET=$IMAGE.sock

# backing succeeds if the header of IMAGE names a backing file. Then IMAGE is not complete.
backing() { qemu-img info -U --output=json "$IMAGE" | grep -q '"backing-filename":'; }

# If an earlier run stopped before it created IMAGE, its IMAGE.pin still counts: it names the
# snapshot that the earlier run made of a VM.
if [ -e "$IMAGE" ] && ! backing; then
	echo "$0: $IMAGE is complete, or is not from this script" >&2
	exit 2
elif [ -e "$IMAGE" ] && [ ! -e "$IMAGE.pin" ]; then
	echo "$0: $IMAGE.pin is missing, so nothing says from which disk $IMAGE can be completed" >&2
	exit 2
fi

dir=$(mktemp -d)
exporter='' qemu='' ticker=''
mkfifo "$dir/ready" "$dir/qmp.in" "$dir/qmp.out"
exec 3<>"$dir/qmp.in" 4<>"$dir/qmp.out" # <> does not wait for QEMU to open the other end

end() {
	trap - EXIT HUP INT TERM
	[ -z "$ticker" ] || kill "$ticker" 2>/dev/null || true
	[ -z "$qemu" ] || { echo '{"execute": "quit"}' >&3; wait "$qemu" || true; } # to the guest, a power failure
	[ -z "$exporter" ] || { kill "$exporter" 2>/dev/null || true; wait "$exporter" || true; }
	rm -rf "$dir"
}
trap end EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# serve runs the export, and starts it again if it dies. The first export writes its address
# to the pipe "ready".
serve() {
	server='' left=${RESTARTS:-3} out=$dir/ready
	trap 'status=0; [ -z "$server" ] || { kill "$server"; wait "$server" || status=$?; }; exit "$status"' TERM
	trap '' HUP INT
	while :; do
		began=$(date +%s) status=0
		# shellcheck disable=SC2086 # the flags are several words
		vddkcp export ${VDDKCP_FLAGS-} --pin "$IMAGE.pin" --listen "unix:$SOCKET" "$SRC" >"$out" &
		server=$!
		wait "$server" || status=$?
		server='' out=/dev/null
		[ -e "$dir/started" ] || exit "$status"
		[ $(($(date +%s) - began)) -lt 60 ] || left=${RESTARTS:-3}
		if [ "$status" = 2 ] || [ "$left" = 0 ]; then
			echo "the export ended with status $status and is not started again: the guest is paused when it needs the disk" >&2
			exit "$status"
		fi
		left=$((left - 1))
		echo "the export ended with status $status and is started again" >&2
		sleep 1
	done
}
serve &
exporter=$!
read -r _ <"$dir/ready" || { wait "$exporter" || exit; exit 1; }
: >"$dir/started"

# The header of IMAGE names the export as its backing file until IMAGE is complete, so that
# no program takes an incomplete IMAGE for a complete one.
export='{"driver": "raw", "file": {"driver": "nbd", "server": {"type": "unix", "path": "'$SOCKET'"}, "reconnect-delay": '${DELAY:-30}'}}'
[ -e "$IMAGE" ] || qemu-img create -q -f qcow2 -F raw -b "json:$export" "$IMAGE"

{
	status=0
	# shellcheck disable=SC2086 # the flags are several words
	qemu-system-x86_64 -machine accel="${ACCEL:-kvm:tcg}" -m "${MEMORY_MIB:-2048}" -smp "${CPUS:-2}" \
		-no-shutdown -chardev "pipe,id=qmp,path=$dir/qmp" -mon chardev=qmp,mode=control \
		-blockdev '{"driver": "qcow2", "node-name": "disk", "discard": "unmap", "backing": '"$export"',
			"file": {"driver": "file", "filename": "'"$IMAGE"'", "discard": "unmap"}}' \
		-device "${DEVICE:-ide-hd},id=disk,drive=disk,rerror=stop,werror=stop" ${QEMU_FLAGS-} || status=$?
	echo "{\"ended\": $status}" >&4
} 3>&- &
qemu=$!

while sleep 2 && kill -0 $$; do echo '{"execute": "query-block-jobs"}'; done >&3 &
ticker=$!

copied='' off='' failed='' paused='' told='' last=''
while read -r line <&4; do
	case $line in
	'{"QMP"'*)
		echo '{"execute": "qmp_capabilities"}' >&3
		echo '{"execute": "block-stream", "id": "begin", "arguments":
			{"job-id": "copy", "device": "disk", "on-error": "stop", "speed": '"${SPEED:-0}"'}}' >&3 ;;
	*'"id": "begin", "error"'*)
		echo "QEMU does not begin to copy: $line" >&2
		exit 1 ;;
	'{"return": ['*)
		[ -z "$paused" ] || echo '{"execute": "cont"}' >&3
		case $line in *'"offset": '*) ;; *) continue ;; esac
		[ -z "$failed" ] || echo '{"execute": "block-job-resume", "arguments": {"device": "copy"}}' >&3
		failed=''
		now=${line##*\"offset\": } len=${line##*\"len\": }
		now="copied $((${now%%[,\}]*} >> 20)) of $((${len%%[,\}]*} >> 20)) MiB"
		[ "$now" != "$last" ] || continue
		last=$now told=''
		echo "$now" ;;
	*'"event": "BLOCK_JOB_ERROR"'*)
		[ -n "$told" ] || echo "the copy is paused until its next attempt succeeds: $line" >&2
		failed=1 told=1 ;;
	*'"event": "BLOCK_IO_ERROR"'*)
		[ -n "$paused" ] || echo "the guest is paused until its next attempt succeeds: $line" >&2
		paused=1 ;;
	*'"event": "RESUME"'*)
		paused='' ;;
	*'"event": "BLOCK_JOB_COMPLETED"'*)
		if backing; then
			echo "QEMU has not copied everything: $line" >&2
			exit 1
		fi
		copied=1
		echo "$IMAGE is complete"
		rm -f "$IMAGE.pin" # so that the export removes its snapshot
		kill "$exporter" 2>/dev/null || true
		[ -z "$off" ] || echo '{"execute": "quit"}' >&3 ;;
	*'"event": "SHUTDOWN"'*)
		off=1
		echo "the guest is off"
		[ -z "$copied" ] || echo '{"execute": "quit"}' >&3 ;;
	'{"ended": '*) break ;;
	esac
done
qemu=''
[ -n "$copied" ] || { echo "$IMAGE is not complete: run the script again to continue" >&2; exit 1; }
status=0
wait "$exporter" || status=$?
exporter=''
[ "$status" = 0 ] || { echo "the export ended with status $status" >&2; exit "$status"; }
[ "$line" = '{"ended": 0}' ]
