#!/bin/sh
# Submits a batch as N shards, and a job that merges their reports afterwards:
#
#   submit.sh JOBS.json N [flags of sbatch for the shards]
#
# Settings that both need, such as partition and account, go into the environment:
# SBATCH_PARTITION, SBATCH_ACCOUNT. The script prints the job ids of the array and of the
# merge.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 JOBS.json N [flags of sbatch]" >&2; exit 2; }
jobs=$(realpath -e "$1")
shards=$2
shift 2
case $shards in
'' | *[!0-9]* | 0*) echo "$0: number of shards: \"$shards\": want 1 or more" >&2; exit 2 ;;
esac
unset VDDKCP_PASSWORD VDDKCP_COOKIE # sbatch would write them into Slurm's own files
here=$(dirname "$(realpath "$0")")
# Remove old reports, so that a shard that never runs has none.
rm -f "${jobs%.json}.$shards-shards"/*.json
array=$(sbatch --parsable --array="0-$((shards - 1))" "$@" "$here/shard.sbatch" "$jobs" "$shards")
array=${array%%;*} # without the name of the cluster
merge=$(sbatch --parsable --dependency="afterany:$array" "$here/merge.sbatch" "$jobs" "$shards")
echo "$array ${merge%%;*}"
