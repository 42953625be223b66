#!/usr/bin/env bash
# What to measure on a machine with a GPU that is ours for 25 minutes: the most valuable first, each written when known.
#
#   benchmarks/gpu.sh [OUT]               OUT: the folder of results, else benchmarks/results/gpu
#   DRY=1 benchmarks/gpu.sh [OUT]         the same parts on a CPU with the tiny model: shows that they run
#   PYTHON=... MINUTES=25 WHEELS=folder   another interpreter; the time there is; wheels to install what is missing from
#
# Nothing is downloaded. A part that fails, or runs out of its time, is named at the end, and the others run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-benchmarks/results/gpu}
python=${PYTHON:-python3}
dry=${DRY:-}
minutes=${MINUTES:-25}
mkdir -p "$out/logs"
out=$(cd "$out" && pwd)
started=$(date +%s)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install --quiet --no-index --find-links "$WHEELS" 'diffusers>=0.35' transformers accelerate \
    torchmetrics typer rich matplotlib pytest hypothesis DeepCache==0.1.1 networkx >"$out/logs/wheels.log" 2>&1 ||
    echo "wheels: could not be installed (logs/wheels.log)"
fi

failed=()
left() { echo $((minutes * 60 - $(date +%s) + started)); }

# part NAME SECONDS COMMAND...: at most so long, and no longer than what is left
part() {
  local name=$1 most=$2 rest code=0
  shift 2
  rest=$(left)
  if [ "$rest" -lt 20 ]; then
    echo "-- $name: no time left"
    failed+=("$name (no time left)")
    return
  fi
  [ "$most" -gt "$rest" ] && most=$rest
  echo "-- $name (at most ${most} s; ${rest} s are left)"
  timeout --kill-after=10 "$most" "$@" >"$out/logs/$name.log" 2>&1 || code=$?
  tail -n 40 "$out/logs/$name.log"
  [ "$code" -eq 0 ] || failed+=("$name (exit $code)")
}

speed=("$python" -m benchmarks.speed --json "$out/speed.json")
arms="ours-cuda-graphs,eager,helper,compile,ours-uncached,ours-fuse-group-norm,ours-compile,ours-eager"
if [ -n "$dry" ]; then
  small=(--device cpu --latent 8 --steps 4 --rounds 1 --decode 0)
  part gpu-tests 300 "$python" -m pytest -q -p no:cacheprovider -m gpu -rs tests/whole/test_cuda.py
  part speed-tiny 300 "${speed[@]}" --model tiny "${small[@]}" --interval 2,3 --arms "ours-cuda-graphs,eager,ours-eager"
  part profile-shallow 200 "$python" -m benchmarks.speed.profile --model tiny --arm ours-eager --device cpu --latent 8 \
    --step shallow --json "$out/profile-tiny-shallow.json"
  models=(tiny)
  part kernels 200 "$python" -m benchmarks.speed.kernels --device cpu --rounds 2 --json "$out/kernels.json"
else
  part device 60 nvidia-smi
  part speed-tiny 120 "${speed[@]}" --model tiny --latent 8 --interval 3 --arms "ours-cuda-graphs,eager" --minutes 2
  part gpu-tests 240 "$python" -m pytest -q -p no:cacheprovider -m gpu -rs
  for n in 3 2 5; do # a file holds what is measured: the next one adds rows
    [ "$n" = 3 ] && minutes_each=4 || minutes_each=2
    for model in sd15 sdxl; do
      part "speed-$model-$n" $((minutes_each * 60 + 30)) "${speed[@]}" --model "$model" --interval "$n" \
        --minutes "$minutes_each" --arms "$arms"
    done
  done
  models=(sd15 sdxl)
  for model in "${models[@]}"; do
    part "profile-$model" 120 "$python" -m benchmarks.speed.profile --model "$model" --arm ours-cuda-graphs \
      --dtype fp16 --step shallow --json "$out/profile-$model-shallow.json"
  done
  part kernels 120 "$python" -m benchmarks.speed.kernels --json "$out/kernels.json"
  for model in "${models[@]}"; do
    part "speed-$model-without" 180 "${speed[@]}" --model "$model" --interval 3 --minutes 3 --arms "ours-without-*"
  done
fi

for model in "${models[@]}"; do
  modelled="benchmarks/results/codegen-$model.json"
  [ -n "$dry" ] && modelled=${CODEGEN:-}
  if [ -e "$modelled" ] && [ -e "$out/profile-$model-shallow.json" ]; then
    part "beside-$model" 60 "$python" -m benchmarks.codegen.beside "$modelled" "$out/profile-$model-shallow.json"
  fi
done

echo
minutes=$((minutes + 1)) # the table comes in any case
part targets 60 "$python" -m benchmarks.speed.reached "$out/speed.json"
cp "$out/logs/targets.log" "$out/targets.md"
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'not done: %s\n' "${failed[@]}"
  exit 1
fi
echo "all done; results are in $(basename "$out")"
