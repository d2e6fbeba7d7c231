#!/usr/bin/env bash
# The main job, end to end: text -> tokenizer -> data set -> ladder model -> Hugging Face folder.
# On a CPU it takes about five minutes; a GPU is used where there is one. Every stage is skipped when it is
# done, so it may be interrupted and started again.
#
#   bash scripts/quickstart.sh            a ladder model
#   bash scripts/quickstart.sh experts    a ladder model with experts, from the same data set
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

out=quickstart
did_something=false
case "${1:-dense}" in
  dense) run=$out/run model=$out/model ;;
  experts) run=$out/experts-run model=$out/experts-model ;;
  *) echo "quickstart.sh $1: give experts, or nothing" >&2 && exit 2 ;;
esac

stage() { # stage NAME DONE-FILE COMMAND...: runs the command unless its result is there
  local name=$1 result=$2 started=$SECONDS
  shift 2
  if [ -e "$result" ]; then
    echo "== $name: done before ($result)"
    return
  fi
  did_something=true
  echo "== $name"
  "$@"
  echo "== $name: $((SECONDS - started)) s"
}

# One quick start at a time: the commands hold the lock too, so that one whose script was killed is waited for.
mkdir -p $out
exec 9>$out/.lock
if command -v flock >/dev/null && ! flock --nonblock 9; then
  echo "Another quick start is at work here: waiting for it"
  flock 9
fi

started=$SECONDS
make_environment ""
echo "== install: $((SECONDS - started)) s"
ladder="$VENV/bin/megatron-ladder"

# Real text that every machine has: the source of Python's own standard library.
text=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
files=(--include "*.py" --exclude "*/site-packages/*")

# Two ranks, on the CPU or on two GPUs; one on a single GPU. They divide each layer, or each layer's experts.
gpus=$("$VENV/bin/python" -c 'import torch; print(torch.cuda.device_count())')
ranks=2
[ "$gpus" = 1 ] && ranks=1
options=(--preset tiny --parallel.tensor-model-parallel-size $ranks)
if [ $model = $out/experts-model ]; then
  options=(--preset tiny-experts --model.residual ladder --parallel.expert-model-parallel-size $ranks)
fi

stage tokenizer $out/tokenizer/tokenizer.model \
  "$ladder" data train-tokenizer "$text" "${files[@]}" \
  --vocab-size 4096 --max-training-bytes 4000000 --output-dir $out/tokenizer
stage tokenize $out/data/manifest.json \
  "$ladder" data tokenize "$text" "${files[@]}" \
  --tokenizer $out/tokenizer/tokenizer.model --validation-fraction 0.02 --output-dir $out/data
# Exported only when trained to the end, so the exported folder says both are done.
stage train $model/config.json "$ladder" train "${options[@]}" --data.paths $out/data --output-dir $run
stage export $model/config.json "$ladder" export $run $model
stage report $run/report/index.html "$ladder" report $run

if $did_something; then
  echo "== generate"
  "$ladder" generate $model --prompt "def main(" "class Parser:" --max-new-tokens 64 --temperature 0.7
else
  echo "Nothing to do: everything was done before. Remove the folder $out to start afresh."
fi
cat <<END

  the report             $run/report/index.html
  the Hugging Face model $model          (megatron-ladder serve $model)
  the run                $run            (metrics.jsonl, checkpoints, tensorboard)
  the data set           $out/data           (megatron-ladder data inspect $out/data --document 0)

  The command line is $ladder
END
