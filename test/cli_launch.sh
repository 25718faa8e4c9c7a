#!/usr/bin/env bash
# test/cli_launch.sh PROGRAM: the scripts that start runs.
#   run_until_done.sh with commands that only pretend: statuses, progress, attempts, signals
#   speedrun_8xh100.sh: a rehearsal of two ranks on the CPU, and what it says of a missing GPU, data, program, mpirun
#   mpirun_hosts.sh on this host; multi_node.sbatch with a pretended srun; try_link.sh without MPI and NCCL
set -u
program=$(realpath "$1")
cd "$(dirname "$0")/.." || exit 1
root=$PWD tools=$(dirname "$program")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
export HOST_THREADS=1 OMPI_MCA_rmaps_base_oversubscribe=1

check() {      # check STATUS NAME: 0 passes. The status first: $? is also changed by what a name is made of
    if [ "$1" -eq 0 ]; then passed=$((passed + 1)); else echo "FAIL  $2"; failed=$((failed + 1)); fi
}
has() { grep -qE -- "$3" "$2"; check $? "$1: $3 ($(tail -1 "$2"))"; }      # has NAME FILE REGEX
wait_for() {      # wait_for FILE REGEX: at most 30 s
    for _ in $(seq 300); do grep -qE -- "$2" "$1" 2> /dev/null && return 0; sleep 0.1; done
    return 1
}

# ---- run_until_done.sh ---------------------------------------------------------------------
# The n-th call of `pretend FOLDER STEP:STATUS...` leaves a checkpoint of the n-th STEP (-: leaves none) and ends with its STATUS.
cat > "$work/pretend" << 'END'
#!/usr/bin/env bash
folder=$1; shift
mkdir -p "$folder"
calls=$(($(cat "$folder/calls" 2> /dev/null || echo 0) + 1))
echo $calls > "$folder/calls"
word=${!calls}
[ "${word%%:*}" = - ] || { name=$(printf '%s/checkpoints/step_%06d' "$folder" "${word%%:*}"); rm -rf "$name"; mkdir -p "$name"; }
exit "${word##*:}"
END
# `wait FOLDER STATUS` waits for a signal, says which it got, and ends with STATUS; after 20 s without one with 99.
cat > "$work/wait" << 'END'
#!/usr/bin/env bash
for name in INT TERM HUP USR1 USR2; do trap "echo got $name >> $1/signals; exit $2" $name; done
echo $$ >> "$1/ready"
for _ in {1..400}; do sleep 0.05; done
exit 99
END
chmod +x "$work/pretend" "$work/wait"

attempts() {      # attempts NAME WANTED-STATUS WANTED-CALLS STEP:STATUS...
    local name="$1" wanted="$2" calls="$3" status; shift 3
    timeout 60 scripts/run_until_done.sh "$work/pretend" "$work/$name" "$@" --out "$work/$name" --resume auto > "$work/$name.txt" 2>&1
    status=$?
    [ $status -eq "$wanted" ]; check $? "$name: status $wanted (got $status)"
    [ "$(cat "$work/$name/calls")" = "$calls" ]; check $? "$name: $calls attempts (got $(cat "$work/$name/calls"))"
}
attempts done-at-once 0 1  5:0
attempts resumed 0 3       5:75 8:75 20:0
attempts error 1 1         5:1 6:0
attempts error-later 7 2   5:75 6:7 7:0
attempts interrupted 130 1 5:130 6:0
attempts one-stuck 0 5     5:75 5:75 6:75 6:75 7:0
attempts two-stuck 1 3     5:75 5:75 5:75 6:0
attempts backwards 1 4     5:75 9:75 8:75 9:75 10:0
attempts no-checkpoint 1 2 -:75 -:75 5:0
has two-stuck "$work/two-stuck.txt" 'two attempts left no checkpoint beyond step 5'
# What an earlier start left there is gone on from, so it counts.
mkdir -p "$work/requeued/checkpoints/step_000050"
attempts requeued 1 2      50:75 50:75 51:0
mkdir -p "$work/goes-on/checkpoints/step_000050"
attempts goes-on 0 4       50:75 51:75 51:75 52:0
timeout 60 scripts/run_until_done.sh "$work/pretend" "$work/equals" 3:75 3:75 4:0 "--out=$work/equals" --resume=auto > "$work/equals.txt" 2>&1
check $? "--out=DIR --resume=auto"
(cd "$work" && timeout 60 "$root/scripts/run_until_done.sh" ./pretend run 3:75 3:75 4:0 --resume auto > run.txt 2>&1)
check $? "the trainer's own --out"
not_started() {      # not_started NAME STATUS REGEX COMMAND...
    local name="$1" wanted="$2" words="$3" status; shift 3
    scripts/run_until_done.sh "$@" > "$work/$name.txt" 2>&1; status=$?
    [ $status -eq "$wanted" ]; check $? "$name: status $wanted (got $status)"
    has "$name" "$work/$name.txt" "$words"
    ! [ -e "$work/$name/calls" ]; check $? "$name: not started"
}
not_started nonesuch 127 'No such file' "$work/nonesuch" --resume auto
not_started usage 1 'run_until_done.sh COMMAND'
not_started no-resume 1 'needs --resume auto' "$work/pretend" "$work/no-resume" 3:75 4:0
not_started resume-dir 1 'from there each time' "$work/pretend" "$work/resume-dir" 3:75 4:0 --resume "$work/x/checkpoints/step_000003"

signalled() {      # signalled SIGNAL STATUS WANTED: the command gets it once, is not started again
    local folder="$work/signal-$1-$2" status wrapper
    mkdir -p "$folder"
    # A shell starts what is in its background deaf to SIGINT.
    env --default-signal=INT scripts/run_until_done.sh "$work/wait" "$folder" "$2" --resume auto > "$folder/words" 2>&1 &
    wrapper=$!
    wait_for "$folder/ready" .
    kill "-$1" $wrapper
    wait $wrapper; status=$?
    [ $status -eq "$3" ]; check $? "SIG$1, command ends with $2: status $3 (got $status)"
    [ "$(cat "$folder/signals" 2> /dev/null)" = "got $1" ]; check $? "SIG$1 reaches the command once"
    [ "$(wc -l < "$folder/ready")" -eq 1 ]; check $? "SIG$1: not started again"
    ! kill -0 "$(cat "$folder/ready")" 2> /dev/null; check $? "SIG$1: nothing is left running"
}
signalled INT 130 130
signalled TERM 75 75
signalled TERM 130 130
signalled HUP 0 0
signalled USR1 75 75
# USR2 is for the script alone.
mkdir -p "$work/usr2"
scripts/run_until_done.sh "$work/wait" "$work/usr2" 75 --resume auto > "$work/usr2.txt" 2>&1 &
wrapper=$!
wait_for "$work/usr2/ready" .
kill -USR2 $wrapper
wait_for "$work/usr2.txt" SIGUSR2; check $? "SIGUSR2 is noticed"
kill -TERM "$(cat "$work/usr2/ready")"
wait $wrapper; status=$?
[ $status -eq 75 ]; check $? "SIGUSR2, command ends with 75: status 75 (got $status)"
[ "$(cat "$work/usr2/signals")" = "got TERM" ]; check $? "SIGUSR2 does not reach the command"
[ "$(wc -l < "$work/usr2/ready")" -eq 1 ]; check $? "SIGUSR2: not started again"

# srun, pretended: runs the command behind its own flags once and dies of SIGTERM, as the real one; Slurm tells the task.
mkdir -p "$work/bin" "$work/srun-term"
cat > "$work/bin/srun" << 'END'
#!/usr/bin/env bash
while [[ "$1" == --* ]]; do [ "$1" = --mpi=list ] && exit 0; shift; done
trap 'exit 137' TERM
"$@" & wait $!
END
chmod +x "$work/bin/srun"
PATH="$work/bin:$PATH" scripts/run_until_done.sh srun --label "$work/wait" "$work/srun-term" 75 --resume auto > "$work/srun-term.txt" 2>&1 &
wrapper=$!
wait_for "$work/srun-term/ready" .
kill -TERM $wrapper
wait_for "$work/srun-term.txt" SIGTERM
kill -TERM "$(cat "$work/srun-term/ready")"
wait $wrapper; status=$?
[ $status -eq 75 ]; check $? "SIGTERM does not go to srun, which would kill its tasks (status $status)"

# mpirun: of its first signal it is told what it passes on, of the second itself. `stubborn FOLDER STATUS` wants two.
mkdir -p "$work/mpirun-int" "$work/mpirun-twice" "$work/mpi"
cat > "$work/stubborn" << 'END'
#!/usr/bin/env bash
for name in INT TERM USR1; do trap "echo got $name >> $1/signals; signals=x\${signals:-}" $name; done
echo $$ >> "$1/ready"
for _ in {1..400}; do sleep 0.05; [ "${signals:-}" = xx ] && exit "$2"; done
END
chmod +x "$work/stubborn"
ln -s "$work/wait" "$work/mpi/mpirun"
env --default-signal=INT scripts/run_until_done.sh "$work/mpi/mpirun" "$work/mpirun-int" 75 --resume auto > "$work/mpirun-int.txt" 2>&1 &
wrapper=$!
wait_for "$work/mpirun-int/ready" .
kill -INT $wrapper
wait $wrapper; status=$?
[ $status -eq 75 ] && [ "$(cat "$work/mpirun-int/signals")" = "got USR1" ]; check $? "SIGINT becomes SIGUSR1 for mpirun (status $status)"
ln -sf "$work/stubborn" "$work/mpi/mpirun"
env --default-signal=INT scripts/run_until_done.sh "$work/mpi/mpirun" "$work/mpirun-twice" 1 --resume auto > "$work/mpirun-twice.txt" 2>&1 &
wrapper=$!
wait_for "$work/mpirun-twice/ready" .
kill -INT $wrapper
wait_for "$work/mpirun-twice/signals" USR1
kill -INT $wrapper
wait $wrapper; status=$?
[ $status -eq 1 ] && [ "$(tr '\n' ' ' < "$work/mpirun-twice/signals")" = "got USR1 got INT " ]; check $? "and a second one stays what it is (status $status)"

# ---- speedrun_8xh100.sh --------------------------------------------------------------------
# Its own copy of the tree, so that the program under test is the one it finds.
mkdir -p "$work/tree/data" "$work/bin" "$work/no-mpi"
cp -r scripts "$work/tree"
cp "$program" "$work/tree/train_gpt2_cpu"
"$tools/text_to_shards" --out "$work/tree/data/text" train_gpt2.cu llmc/*.cuh > /dev/null; check $? "text_to_shards"
small=(--layers 2 --heads 2 --channels 64 --vocab 320)
speedrun() {      # speedrun NAME ARGUMENTS...: its words into $work/NAME.txt
    local name="$1"; shift
    (cd "$work" && timeout 300 tree/scripts/speedrun_8xh100.sh "$@" > "$work/$name.txt" 2>&1)
}
twelve=(--heads 2 --channels 64 --vocab 320 --table-rows 0)      # the lists of these recipes name its layers
for recipe in modern untied unet sub3_20 sub3 normuon; do
    sizes=("${small[@]}")
    case $recipe in sub3* | normuon) sizes=("${twelve[@]}") ;; esac
    speedrun rehearsal-$recipe $recipe --cpu --data tree/data -- "${sizes[@]}"; check $? "rehearsal of $recipe"
    has "rehearsal of $recipe" "$work/tree/runs/rehearsal-$recipe/log.txt" '^step:2/2 val_loss:[0-9]'
    has "rehearsal of $recipe" "$work/rehearsal-$recipe.txt" '^ranks 2'
done
speedrun three --cpu --ranks 4 --data tree/data -- "${small[@]}" --steps 3 --out "$work/three"; check $? "four ranks"
has "flags behind -- win" "$work/three/log.txt" '^step:3/3 val_loss:[0-9]'
! [ -e "$work/three/checkpoints" ]; check $? "a speedrun writes no checkpoints"
speedrun second modern --cpu --data tree/data -- "${small[@]}"; check $? "a second rehearsal"
has "a second rehearsal" "$work/tree/runs/rehearsal-modern-2/log.txt" '^step:2/2 val_loss:[0-9]'
# Ctrl-C, and on.
(cd "$work" && exec env --default-signal=INT tree/scripts/speedrun_8xh100.sh untied --cpu --data tree/data -- "${small[@]}" --steps 150 \
    > stopped.txt 2>&1) &
wait_for "$work/tree/runs/rehearsal-untied-2/log.txt" '^step:2/'; check $? "a rehearsal that is stopped"
kill -INT $!
wait $!; status=$?
[ $status -eq 75 ]; check $? "Ctrl-C: status 75 (got $status)"
has "Ctrl-C" "$work/stopped.txt" 'goes on with -- --resume auto --out runs/rehearsal-untied-2'
step=$(basename "$work"/tree/runs/rehearsal-untied-2/checkpoints/step_*)
speedrun resumed-run untied --cpu --data tree/data -- "${small[@]}" --steps 150 --resume auto --val-every 1000; check $? "--resume auto"
has "--resume auto" "$work/tree/runs/rehearsal-untied-2/log.txt" "resumed from runs/rehearsal-untied-2/checkpoints/$step: "
! [ -e "$work/tree/runs/rehearsal-untied-3" ]; check $? "--resume auto: in the last folder"
refused() {      # refused NAME REGEX ARGUMENTS...: status 1, these words and no run
    local name="$1" words="$2"; shift 2
    speedrun "$name" "$@"; local status=$?
    [ $status -eq 1 ]; check $? "$name: status 1 (got $status)"
    has "$name" "$work/$name.txt" "$words"
}
refused no-data 'nonesuch has 0 training and 0 validation shards' --cpu --data nonesuch
refused no-argument 'no argument --steps' --steps 5
refused odd-flags 'come in pairs' --cpu --data tree/data -- --steps
refused ranks-word 'ranks x: must be a number' --ranks x
PATH="$work/no-mpi:/usr/bin:/bin" refused no-gpu 'nvidia-smi is not here' modern
# A pretended nvidia-smi, and a program that only has to be there.
cat > "$work/bin/nvidia-smi" << 'END'
#!/usr/bin/env bash
[[ "$*" == *--query-gpu=name* ]] && yes "NVIDIA H100 80GB HBM3" | head -"$GPUS"
exit 0
END
chmod +x "$work/bin/nvidia-smi"
PATH="$work/bin:$PATH"
GPUS=4 refused four-gpus '8 GPUs wanted, found 4' modern
has "four GPUs" "$work/four-gpus.txt" 'speedrun_8xh100.sh modern --ranks 4'
GPUS=8 refused no-program 'train_gpt2 is not built' modern
has "no program" "$work/no-program.txt" '^ +make train_gpt2$'
cp "$program" "$work/tree/train_gpt2"
GPUS=8 refused few-shards 'has 1 training and 1 validation shards; unet reads 16' unet --data tree/data
for i in $(seq -w 2 27); do cp "$work/tree/data/text_train_000001.bin" "$work/tree/data/text_train_0000$i.bin"; done
GPUS=8 speedrun checked modern --data tree/data --check; check $? "all is there"
has "the command" "$work/checked.txt" '^mpirun -np 8 .*train_gpt2 --recipe modern .*--ranks 8 --zero 1'
has "the record's figures" "$work/checked.txt" '^ +5100 +3.2741 +3.2747'
! [ -e "$work/tree/runs/speedrun-modern/log.txt" ]; check $? "--check starts nothing"
# The whole of it, with the CPU's program in the GPU's place: the record's figures and ours side by side.
GPUS=2 speedrun compared modern --ranks 2 --data tree/data -- "${small[@]}" --steps 2 --seq-len 64 --batch-tokens 512 \
    --micro-batch 1 --val-tokens 1024; check $? "a run in the GPU's place"
ours=$(sed -nE 's/^step:0\/2 val_loss:([0-9.]+) .*/\1/p' "$work/tree/runs/speedrun-modern/log.txt")
has "our loss beside the record's" "$work/compared.txt" "^ +0 +16.0058 +16.0098 +${ours:-none} *$"
has "a step we have not" "$work/compared.txt" '^ +5100 +3.2741 +3.2747 +- *$'

# ---- mpirun_hosts.sh -----------------------------------------------------------------------
hosts() { timeout 300 scripts/mpirun_hosts.sh "$@" > "$work/hosts.txt" 2>&1; }
printf '# ours\n\nlocalhost slots=3\n' > "$work/hosts"
hosts "$work/hosts" "$program" --recipe modern "${small[@]}" --seq-len 64 --batch-tokens 384 --micro-batch 1 --steps 2 --val-tokens 500 \
    --batching stream --train "$work/tree/data/text_train_000001.bin" --val "$work/tree/data/*_val_*.bin" --out "$work/hosts-run"
check $? "three ranks by a file of hosts"
has "three ranks" "$work/hosts.txt" '^ranks 3'
hosts "$work/nonesuch" "$program"; [ $? -eq 1 ]; check $? "no file of hosts"
has "no file of hosts" "$work/hosts.txt" 'nonesuch cannot be read'
hosts /dev/null "$program"; [ $? -eq 1 ]; check $? "an empty file of hosts"
hosts "$work/hosts" "$work/nonesuch"; [ $? -eq 1 ]; check $? "hosts: no program"
has "hosts: no program" "$work/hosts.txt" 'is no program'

# ---- multi_node.sbatch ---------------------------------------------------------------------
# Slurm's other programs: scancel sends its signal to the process in $TASK; both write down what they are told.
# shellcheck disable=SC2016    # for the script that is written
printf '#!/usr/bin/env bash\necho "scancel $*" >> "%s"; kill "${1/#--signal=/-}" "$(cat "$TASK")"\n' "$work/slurm.txt" > "$work/bin/scancel"
printf '#!/usr/bin/env bash\necho "scontrol $*" >> "%s"\n' "$work/slurm.txt" > "$work/bin/scontrol"
chmod +x "$work"/bin/s*
batch() {      # batch NAME PROGRAM ARGUMENTS...
    local name="$1" program="$2"; shift 2
    mkdir -p "$work/$name"
    export SLURM_SUBMIT_DIR="$root" SLURM_JOB_ID=17 SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=16 PROGRAM="$program" TASK="$work/$name/ready"
    exec timeout 60 bash scripts/multi_node.sbatch "$work/$name" "$@" > "$work/$name.txt" 2>&1
}
(batch batch-done "$work/pretend" 5:75 9:0 --out "$work/batch-done" --resume auto); check $? "sbatch: resumed, done"
has "sbatch" "$work/batch-done.txt" '2 nodes, 16 ranks, --mpi=none'
(batch batch-error "$work/pretend" 5:3 --resume auto); [ $? -eq 3 ]; check $? "sbatch: an error is the end"
! [ -e "$work/slurm.txt" ]; check $? "sbatch: nothing put back into the queue"
time_is_up() {      # time_is_up STATUS STARTS REQUEUED: what the tasks end with, how often Slurm started the job anew, what it is told
    local name="batch-$1-$2" batch got
    rm -f "$work/slurm.txt"
    # shellcheck disable=SC2030    # meant for the subshell alone
    (export SLURM_RESTART_COUNT="$2"; batch "$name" "$work/wait" "$1" --resume auto) &
    batch=$!
    wait_for "$work/$name/ready" .
    kill -USR1 "$(pgrep -P $batch)"      # behind timeout
    wait $batch; got=$?
    [ $got -eq "$1" ]; check $? "sbatch, time is up: status $1 (got $got)"
    [ "$(cat "$work/$name/signals")" = "got TERM" ]; check $? "sbatch, time is up: the task gets SIGTERM"
    [ "$(wc -l < "$work/$name/ready")" -eq 1 ]; check $? "sbatch, time is up: not started again"
    [ "$(grep -c 'requeue 17' "$work/slurm.txt")" -eq "$3" ]; check $? "sbatch, time is up: status $1, $2 starts before: $3 times back into the queue"
}
time_is_up 75 0 1
time_is_up 75 19 1
time_is_up 75 20 0
time_is_up 130 0 0
# shellcheck disable=SC2031    # set here for the first time
export SLURM_RESTART_COUNT=20; rm -f "$work/slurm.txt"
(batch batch-often "$work/pretend" 5:75 5:75 5:75 --out "$work/batch-often" --resume auto); [ $? -eq 1 ]; check $? "sbatch: without progress"
! [ -e "$work/slurm.txt" ]; check $? "sbatch: without progress not put back"
unset SLURM_RESTART_COUNT
# scancel: the tasks end with a checkpoint, and that is all.
(batch batch-cancel "$work/wait" 75 --resume auto) &
batch=$!
wait_for "$work/batch-cancel/ready" .
kill -TERM "$(pgrep -P $batch)" "$(cat "$work/batch-cancel/ready")"
wait $batch; status=$?
[ $status -eq 75 ]; check $? "sbatch, cancelled: status 75 (got $status)"
! [ -e "$work/slurm.txt" ]; check $? "sbatch, cancelled: not put back into the queue"
(batch batch-no-resume "$work/pretend" 5:75); [ $? -eq 1 ]; check $? "sbatch: without --resume auto"
has "sbatch" "$work/batch-no-resume.txt" 'needs --resume auto'

# ---- try_link.sh ---------------------------------------------------------------------------
link() { scripts/try_link.sh "$work/link/ok" "$@" > "$work/link.txt" 2>&1; }
link "${CXX:-g++} -I$work" "-lm -lnonesuch" all; [ $? -eq 1 ]; check $? "try_link: no MPI"
has "try_link" "$work/link.txt" 'apt install libopenmpi-dev openmpi-bin'
has "try_link" "$work/link.txt" 'make all NCCL=0'
# MPI there, NCCL not: headers that stand for them.
echo 'static inline int MPI_Finalize() { return 0; }' > "$work/mpi.h"
echo '#error stands for a nccl.h that is not there' > "$work/nccl.h"
link "${CXX:-g++} -I$work" -lm all; check $? "try_link: what links"
[ -s "$work/link/ok" ]; check $? "try_link: writes down what linked"
link "${CXX:-g++} -I$work" "-lm -lnccl" train_gpt2; [ $? -eq 1 ]; check $? "try_link: no NCCL"
has "try_link" "$work/link.txt" 'make train_gpt2 NCCL_HOME=/dir'
! [ -e "$work/link/ok" ]; check $? "try_link: forgets what no longer links"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
