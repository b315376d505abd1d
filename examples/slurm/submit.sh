#!/bin/sh
# Submits a batch as N shards, and what merges their reports after them:
#
#   submit.sh JOBS.json N [flags of sbatch for the shards]
#
# What both need, as partition and account, goes into the environment:
# SBATCH_PARTITION, SBATCH_ACCOUNT. Prints the ids of the array and of the merge.
set -eu
[ $# -ge 2 ] || { echo "usage: $0 JOBS.json N [flags of sbatch]" >&2; exit 2; }
jobs=$(realpath -e "$1")
shards=$2
shift 2
case $shards in
'' | *[!0-9]* | 0*) echo "$0: number of shards: \"$shards\": want 1 or more" >&2; exit 2 ;;
esac
unset VDDKCP_PASSWORD VDDKCP_COOKIE # sbatch would write them into files of Slurm's
here=$(dirname "$(realpath "$0")")
# All shards run now: one that never does must not have a report.
rm -f "${jobs%.json}.$shards-shards"/*.json
array=$(sbatch --parsable --array="0-$((shards - 1))" "$@" "$here/shard.sbatch" "$jobs" "$shards")
array=${array%%;*} # the cluster
merge=$(sbatch --parsable --dependency="afterany:$array" "$here/merge.sbatch" "$jobs" "$shards")
echo "$array ${merge%%;*}"
