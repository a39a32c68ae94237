#!/usr/bin/env bash
# Check, tune and measure the expert kernels on one Hopper GPU (H100, H200): about 8 minutes.
#
#   benchmarks/gpu.sh [--dry-run] [FOLDER]
#
# Needs Python with jax for CUDA and jaxtyping; torch and tokamax are measured beside if they are there. Nothing is
# installed or downloaded, and jaxmoe need not be installed. Results go to benchmarks/results/, the check and the tiles to
# kernels/expert_mlp/tuning/measured/; both also to FOLDER if one is given. Run it again on the same day to measure
# lines that there was no time for. With --dry-run, the same steps on a CPU with tiny shapes; they write only to FOLDER.
#
# Environment: PYTHON (python3), SECONDS_IN_ALL (480), SECONDS_PER_LAUNCH (5, of the search for tiles).
set -uo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
dry=
if [ "${1:-}" = --dry-run ]; then
	dry=yes
	shift
fi
folder=${1:-}
if [ -n "$folder" ]; then
	mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
fi

work=$(mktemp -d)
keeper=
trap '[ -n "$keeper" ] && kill "$keeper" 2>/dev/null; rm -rf "$work"' EXIT

# The package as an installation lays it out, made of links.
mkdir "$work/package" "$work/package/jaxmoe"
for file in "$repository"/jaxmoe/*; do
	ln -s "$file" "$work/package/jaxmoe/"
done
for part in kernels interop configs; do
	ln -s "$repository/$part" "$work/package/jaxmoe/$part"
done
export PYTHONPATH="$work/package${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONDONTWRITEBYTECODE=1
# Not from the repository: python -m would find its jaxmoe/ first, which is the package without these parts.
cd "$work" || exit 2
# torch has its own share of the memory in the same process.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.8

step() {
	echo
	echo "== $1 ($(date +%H:%M:%S))"
}

# Runs a command for at most $1 seconds: a kernel that waits for ever must not take the machine with it.
limited() {
	local seconds=$1
	shift
	timeout --kill-after=10 "$seconds" "$@"
}

if [ -n "$dry" ]; then
	export JAX_PLATFORMS=cpu
	measured=${folder:-$work/out}
	results=$measured
	tune_check=(--rehearse --check --output "$measured")
	tune_tiles=(--rehearse --tiles --seconds 0 --output "$measured")
	layers=(--quick --output "$results")
else
	measured=$repository/kernels/expert_mlp/tuning/measured
	results=$repository/benchmarks/results
	tune_check=(--check)
	tune_tiles=(--tiles --model Qwen3-30B-A3B --model Mixtral-8x7B --tokens 8192 --seconds "${SECONDS_PER_LAUNCH:-5}")
	layers=(--resume)
fi

keep() {
	cp -f "$measured"/*.json "$results"/moe_layer*_gpu.json "$folder"/ 2>/dev/null
}

if [ -n "$folder" ] && [ -z "$dry" ]; then
	# All along, so that a run that is cut off has left what it found.
	(while sleep 5; do keep; done) &
	keeper=$!
fi

step "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu --format=csv 2>/dev/null ||
	echo "no nvidia-smi"
"$python" - <<'PROGRAM' || exit 2
import importlib.metadata as metadata
import platform

import jax

print("python", platform.python_version(), "on", jax.devices())
for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch", "triton", "tokamax"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
PROGRAM

step "check of every kernel"
# Without XLA's search for the fastest algorithm: nothing is timed here.
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_autotune_level=0" limited 300 "$python" -m jaxmoe.kernels.tune "${tune_check[@]}"
status=$?
if [ "$status" -ne 0 ]; then
	if [ "$status" -eq 124 ]; then
		echo "error: the case named last did not end: a kernel waits for ever, or compiles too slowly" >&2
	fi
	echo "error: the kernels are not found right here (exit code $status): nothing is measured" >&2
	exit 1
fi

step "tiles of the most important launches"
limited 120 "$python" -m jaxmoe.kernels.tune "${tune_tiles[@]}" ||
	echo "the search for tiles ended early (exit code $?): the rest is measured with what it had found"

step "expert layers"
left=$((${SECONDS_IN_ALL:-480} - SECONDS - 40))
[ "$left" -lt 60 ] && left=60
limited $((left + 120)) "$python" "$repository/benchmarks/moe_layer.py" --seconds "$left" "${layers[@]}"
status=$?
if [ "$status" -ne 0 ]; then
	echo "error: moe_layer.py ended early (exit code $status); the lines before that are kept" >&2
fi
[ -n "$keeper" ] && keep

step "done in $SECONDS seconds"
echo "results: $results"
echo "check and tiles: $measured"
exit "$status"
