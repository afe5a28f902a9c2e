#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Trains a whole tiny editor into $SPECEDIT_RUN_DIR (default runs/editor), then measures it. About 20 minutes on an
# H100. Run it again to go on where it stopped; touch $SPECEDIT_RUN_DIR/STOP to end the training early.
#
# FAMILY=qwen trains a Qwen-Image-Edit in place of a FLUX.1-Kontext.
# JUDGE_SECONDS=0 trains no judge: the shipped one is used.
# GPUS=2 trains the transformer on the first two GPUs, each with a batch of its own.
# START=FOLDER goes on from an exported editor (specedit_kernels/assets/tiny_kontext, say) and keeps its autoencoder.
#
#   SPECEDIT_RUN_DIR=/tmp/run VAE_SECONDS=220 EDITOR_SECONDS=720 JUDGE_SECONDS=90 bash bench/quality/train.sh
set -u
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export SPECEDIT_RUN_DIR="${SPECEDIT_RUN_DIR:-runs/editor}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
family="${FAMILY:-flux}"
export TRANSFORMERS_VERBOSITY=error DIFFUSERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1
python="${PYTHON:-python3}"
mkdir -p "$SPECEDIT_RUN_DIR"
log="$SPECEDIT_RUN_DIR/log.txt"
rm -f "$SPECEDIT_RUN_DIR/STOP"

if [ -n "${START:-}" ]; then
    EDITOR_ARGS="${EDITOR_ARGS:-} --start $START"
    [ -e "$SPECEDIT_RUN_DIR/vae" ] || cp -r "$START/vae" "$SPECEDIT_RUN_DIR/vae"
fi

say() { echo "$(date +%H:%M:%S) train.sh: $*" >> "$log"; }

# The autoencoder; meanwhile the transformer's kernels are compiled into the cache and tried on noise.
# (static: Inductor of torch 2.11 fails an assertion on these blocks with dynamic shapes)
mode="${COMPILE:-static}"
"$python" "$here/train_vae.py" --family "$family" --seconds "${VAE_SECONDS:-220}" ${VAE_ARGS:-} >> "$log" 2>&1 &
vae=$!

# The judge needs the autoencoder alone.
(
    while kill -0 "$vae" 2>/dev/null; do sleep 1; done
    [ "${JUDGE_SECONDS:-90}" = 0 ] && exit
    "$python" "$here/train_judge.py" --family "$family" --seconds "${JUDGE_SECONDS:-90}" ${JUDGE_ARGS:-} \
        >> "$log" 2>&1 || say "the judge failed"
) &
judge=$!

compile_all() {
    tries=()
    for size in 512 256 128; do
        timeout "${TRY_SECONDS:-240}" "$python" "$here/train_editor.py" --family "$family" --try-only --compile "$1" \
            --sizes "$size" ${EDITOR_ARGS:-} >> "$log" 2>&1 &
        tries+=($!)
    done
    for try in "${tries[@]}"; do wait "$try" || return 1; done
}
if [ "$mode" != none ] && [ ! -e "$SPECEDIT_RUN_DIR/compile_mode" ]; then
    for candidate in $(printf '%s\n' "$mode" static | uniq); do
        if compile_all "$candidate"; then
            echo "$candidate" > "$SPECEDIT_RUN_DIR/compile_mode"
            break
        fi
        say "compile mode $candidate failed"
        kill -0 "$vae" 2>/dev/null || break
    done
fi
[ -e "$SPECEDIT_RUN_DIR/compile_mode" ] || echo none > "$SPECEDIT_RUN_DIR/compile_mode"
mode="$(cat "$SPECEDIT_RUN_DIR/compile_mode")"
wait "$vae" || { say "the autoencoder failed"; exit 1; }

# One process a GPU; each sees its own alone, so that all find the kernels compiled above.
train_editor() {
    local count="${GPUS:-1}" ranks=() rank code=0
    if [ "$count" = 1 ]; then
        "$python" "$here/train_editor.py" --family "$family" --seconds "${EDITOR_SECONDS:-720}" --compile "$1" \
            ${EDITOR_ARGS:-} >> "$log" 2>&1
        return
    fi
    for rank in $(seq 0 $((count - 1))); do
        RANK=$rank WORLD_SIZE=$count MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-29577}" \
            CUDA_VISIBLE_DEVICES=$rank "$python" "$here/train_editor.py" --family "$family" --seconds "${EDITOR_SECONDS:-720}" --compile "$1" \
            ${EDITOR_ARGS:-} >> "$log" 2>&1 &
        ranks+=($!)
    done
    for rank in "${ranks[@]}"; do  # where one fails, the others lose their connection and fail too
        wait "$rank" || code=$?
    done
    return $code
}

say "editor starts, compile mode $mode, ${GPUS:-1} processes"
train_editor "$mode"
code=$?
if [ "$code" -ne 0 ] && [ "$mode" != none ]; then
    say "the editor stopped with $code; going on from its last checkpoint without compiling"
    echo none > "$SPECEDIT_RUN_DIR/compile_mode"
    train_editor none
fi
wait "$judge"
if [ "${EVALUATE:-1}" != 0 ]; then
    "$python" "$here/evaluate.py" ${EVALUATE_ARGS:-} >> "$log" 2>&1 || say "the evaluation failed"
fi
say "all done"
