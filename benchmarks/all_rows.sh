#!/usr/bin/env bash
# The rows behind the tables, the plot and the goals of the forward, in parts:
#
#     bash benchmarks/all_rows.sh                     # all, about 9 minutes on an H200 whose kernels are in TILELANG_CACHE_DIR
#     bash benchmarks/all_rows.sh varlen small        # these
#
# RESULTS: folder of the rows; COMMIT: of this tree, where git can't tell it; ROUNDS: trials of each contestant, for all parts.
# Rows are appended shape by shape: a part that is stopped keeps what it had. But a table or the plot takes whole runs only.
# Status 1 if a shape of any part had no row.
set -u
cd "$(dirname "$0")/.."
status=0

# rows ROUNDS ARGUMENTS...
rows() {
    local rounds=${ROUNDS:-$1}
    shift
    python -m benchmarks.run forward --rounds "$rounds" ${RESULTS:+--results "$RESULTS"} ${COMMIT:+--commit "$COMMIT"} "$@" || status=1
}

part() {
    echo "== $1"
    case $1 in # about so many seconds each
        peers) rows 4 --cases peers --against ours-lse cudnn ;;                              # 100
        fp16) rows 2 --cases peers --against cudnn --dtype float16 ;;                        # 55
        varlen) rows 3 --cases varlen --against ours-dense fa2 ;;                            # 100
        small) rows 4 --cases small-grids --against cudnn --repeats 40 ;;                    # 85
        lengths) rows 3 --cases lengths --against cudnn fa2 ;;                               # 50
        window) rows 2 --cases window softcap --against fa2 flex ;;                          # 130, half of it torch.compile
        heads) rows 4 --cases head-sizes --against cudnn ;;                                  # 40
        tiny) rows 4 --cases tiny --against cudnn fa2 --metric host graph ;;                 # 15
        *) echo "all_rows.sh: no part $1" >&2 && exit 2 ;;
    esac
}

for name in "${@:-peers fp16 varlen small lengths window heads tiny}"; do
    for one in $name; do part "$one"; done
done
exit $status
