#!/usr/bin/env bash
# Run every measurement of docs/ROBUSTNESS.md, then write its tables and plots: make robustness.
#
# Existing results in docs/results/ are kept; delete one to measure it again. An interrupted measurement
# resumes. AutoAttack on 1,000 images takes a minute and a half on a GPU (H100) and three hours on two CPU
# cores, CLIPure-Diff about as long on these cores, and everything else less than one hour.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=docs/results

plain="runs/fashion/bundle --checkpoint runs/fashion --transfer-from runs/fashion-tga"
robust="edgeclip/bundles/fashion --checkpoint runs/fashion-robust --transfer-from runs/fashion"

measure() { # MODEL FILE OPTIONS: measure the accuracy of one model under one attack
  local model=$1 file=$out/$2.json
  shift 2
  echo "$file"
  # A complete result, including the tenth check, is kept, whatever package versions produced it.
  if grep -qs '"finished": 1000' "$file" && grep -q 'feature matching is weaker' "$file"; then
    return
  fi
  # shellcheck disable=SC2086  # a model consists of several words
  "$python" -m train.evaluate ${!model} --data fashion-mnist --out "$file" --batch-size 50 "$@"
}

[ -e runs/fashion/bundle ] || "$python" -m export runs/fashion -o runs/fashion/bundle

# The published purification against the model without it, at several attack sizes.
for eps in 8 16; do
  measure plain plain-none-$eps --purify none --eps $eps/255 --attack pgd --steps 50
  measure plain plain-cos-$eps --purify cos --eps $eps/255 --attack pgd --steps 50
done
measure plain plain-none-32 --purify none --eps 32/255 --attack pgd --steps 100
measure robust robust-none-16 --purify none --eps 16/255 --attack pgd --steps 50

# Purification steps and step sizes, at the attack size of the robust model's training.
grid() { # MODEL STEPS_OF_THE_ATTACK SETTING ...
  local model=$1 steps=$2 setting
  local common="--eps 8/255 --attack cw --steps $steps --check-samples 50"
  shift 2
  measure $model grid/$model-none --purify none $common
  for setting; do
    measure $model grid/$model-$setting --purify cos $common \
      --purify-steps "${setting%x*}" --purify-step-size "${setting#*x}"
  done
}
mkdir -p $out/grid
grid plain 40 10x0.01 10x0.03 10x0.1 1x1 5x30 9x30 10x30
grid robust 30 10x0.01 10x0.03 10x0.1 10x30

# CLIPure-Diff: train a prior and export a bundle for each model, then measure the published setting and a
# small one. On two CPU cores the priors take a quarter of an hour, and each measurement half an hour.
"${MAKE:-make}" diff-bundles
plain_diff="runs/fashion-diff --checkpoint runs/fashion --prior runs/fashion-prior"
robust_diff="runs/fashion-robust-diff --checkpoint runs/fashion-robust --prior runs/fashion-robust-prior"

diff() { # MODEL STEPS_OF_THE_ATTACK SETTING ...: each STEPSxSIZE@FIRST-LAST
  local model=$1 setting numbers times
  local common="--eps 8/255 --attack cw --check-samples 30 --steps $2"
  shift 2
  measure ${model}_diff diff/$model-none --purify none $common
  for setting; do
    numbers=${setting%@*} times=${setting#*@}
    measure ${model}_diff diff/$model-${setting/@/-t} --purify diff $common \
      --purify-steps "${numbers%x*}" --purify-step-size "${numbers#*x}" \
      --purify-timesteps "${times%-*}" "${times#*-}"
  done
  # The published setting against an attacker without the seed.
  measure ${model}_diff diff/$model-eot --purify diff $common --steps 10 --eot 20 -n 200
}
mkdir -p $out/diff
diff plain 40 10x30@900-999 10x0.03@900-999
diff robust 30 10x30@900-999 10x0.03@900-999

# The figure of the embedded model.
measure robust robust-autoattack-8 --purify none --eps 8/255 --attack autoattack --batch-size 500

"$python" -m train.report $out/*.json $out/grid/*.json $out/diff/*.json --checks \
  --into docs/ROBUSTNESS.md --plots docs/plots
"$python" -m train.report $out/training/*.json --samples 250 --brief --into docs/training.md
