#!/usr/bin/env bash
# The rows behind the tables, the plots and the goals, in parts:
#
#     bash benchmarks/all_rows.sh                     # all, about 20 minutes on an H200 whose kernels are in TILELANG_CACHE_DIR
#     bash benchmarks/all_rows.sh varlen small        # these
#
# RESULTS: folder of the rows; COMMIT: of this tree, where git can't tell it; ROUNDS: trials of each contestant, for all parts.
# Rows are appended shape by shape: a part that is stopped keeps what it had. But a table or the plot takes whole runs only.
# Status 1 if a shape of any part had no row.
set -u
cd "$(dirname "$0")/.."
status=0

# rows OPERATION ROUNDS ARGUMENTS...
rows() {
    local op=$1 rounds=${ROUNDS:-$2}
    shift 2
    python -m benchmarks.run "$op" --rounds "$rounds" ${RESULTS:+--results "$RESULTS"} ${COMMIT:+--commit "$COMMIT"} "$@" || status=1
}

part() {
    echo "== $1"
    case $1 in # about so many seconds each
        peers) rows forward 4 --cases peers --against ours-lse cudnn ;;                      # 100
        fp16) rows forward 2 --cases peers --against cudnn --dtype float16 ;;                # 55
        varlen) rows forward 3 --cases varlen --against ours-dense fa2 ;;                    # 100
        small) rows forward 4 --cases small-grids --against cudnn --repeats 40 ;;            # 85
        lengths) rows forward 3 --cases lengths --against cudnn fa2 ;;                       # 50
        window) rows forward 2 --cases window softcap --against fa2 flex ;;                  # 130, half of it torch.compile
        heads) rows forward 4 --cases head-sizes --against cudnn ;;                          # 40
        tiny) rows forward 4 --cases tiny --against cudnn fa2 --metric host graph ;;         # 15
        bwd-peers) rows backward 4 --cases peers --against ours-det cudnn ;;                 # 150
        bwd-fp16) rows backward 2 --cases peers --against cudnn --dtype float16 ;;           # 60
        bwd-varlen) rows backward 2 --cases varlen --against ours-dense fa2 ;;               # 100
        bwd-small) rows backward 3 --cases small-training --against cudnn --repeats 40 ;;    # 80
        bwd-lengths) rows backward 2 --cases lengths --against cudnn fa2 ;;                  # 60
        bwd-heads) rows backward 4 --cases head-sizes --against cudnn ;;                     # 50
        bwd-window) rows backward 2 --cases masked-training --against fa2 flex ;;            # 105, most of it torch.compile
        decode) rows decode 4 --cases decode-peers decode-models decode-queries --against cudnn fa2 --metric cold busy ;; # 150
        decode-paged) rows decode 4 --cases decode-peers decode-queries --against ours-page16 ours-page128 --metric cold ;; # 30
        decode-tiny) rows decode 4 --cases decode-tiny --against cudnn fa2 --metric host cold ;; # 5
        *) echo "all_rows.sh: no part $1" >&2 && exit 2 ;;
    esac
}

for name in "${@:-peers fp16 varlen small lengths window heads tiny bwd-peers bwd-fp16 bwd-varlen bwd-small bwd-lengths bwd-heads bwd-window decode decode-paged decode-tiny}"; do
    for one in $name; do part "$one"; done
done
exit $status
