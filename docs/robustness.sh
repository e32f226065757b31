#!/usr/bin/env bash
# Every measurement of docs/ROBUSTNESS.md, then its tables and plots: make robustness.
#
# The results in docs/results/ are taken up as they are; remove one to measure it again. AutoAttack
# on 1,000 images takes a minute and a half on a GPU (H100) and three hours on two CPU cores, CLIPure-Diff
# about as much there, all else less than one. A measurement that was stopped goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=docs/results

plain="runs/fashion/bundle --checkpoint runs/fashion --transfer-from runs/fashion-tga"
robust="edgeclip/bundles/fashion --checkpoint runs/fashion-robust --transfer-from runs/fashion"

measure() { # MODEL FILE OPTIONS: accuracy of one model under one attack
  local model=$1 file=$out/$2.json
  shift 2
  echo "$file"
  # Complete, the tenth check too: kept, by whatever versions of the packages it was measured.
  if grep -qs '"finished": 1000' "$file" && grep -q 'feature matching is weaker' "$file"; then
    return
  fi
  # shellcheck disable=SC2086  # a model is several words
  "$python" -m train.evaluate ${!model} --data fashion-mnist --out "$file" --batch-size 50 "$@"
}

[ -e runs/fashion/bundle ] || "$python" -m export runs/fashion -o runs/fashion/bundle

# The published purification against the model without it, by the size of the attack.
for eps in 8 16; do
  measure plain plain-none-$eps --purify none --eps $eps/255 --attack pgd --steps 50
  measure plain plain-cos-$eps --purify cos --eps $eps/255 --attack pgd --steps 50
done
measure plain plain-none-32 --purify none --eps 32/255 --attack pgd --steps 100
measure robust robust-none-16 --purify none --eps 16/255 --attack pgd --steps 50

# Steps and step sizes of the purification, at the size that the robust model was trained for.
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

# CLIPure-Diff: for each model a prior and a bundle that has it, then the published setting and a
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
  # The published setting for an attack that does not know the seed.
  measure ${model}_diff diff/$model-eot --purify diff $common --steps 10 --eot 20 -n 200
}
mkdir -p $out/diff
diff plain 40 10x30@900-999 10x0.03@900-999
diff robust 30 10x30@900-999 10x0.03@900-999

# The embedded model's own figure.
measure robust robust-autoattack-8 --purify none --eps 8/255 --attack autoattack --batch-size 500

"$python" -m train.report $out/*.json $out/grid/*.json $out/diff/*.json --checks \
  --into docs/ROBUSTNESS.md --plots docs/plots
"$python" -m train.report $out/plain-none-8.json $out/robust-autoattack-8.json --brief --into README.md
"$python" -m train.report $out/training/*.json --samples 250 --brief --into docs/training.md
