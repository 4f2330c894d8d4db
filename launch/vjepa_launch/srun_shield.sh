# A TERM for this job is meant for the ranks: they save and exit. This script must survive it to decide about a requeue.
# srun would kill the ranks at once if it received the TERM, and under ProctrackType=linuxproc it would, as a child of
# this script. So srun runs in the background of a subshell that exits at once, and its new parent is init. Its output
# goes to file descriptor 3, the output of this script. Its exit code goes through the command substitution, which also
# waits for it. An empty code means that srun was killed.
trap : TERM
srun() { { code=$( ( { command srun "$@" >&3; echo $?; } & ) ); } 3>&1; return "${code:-137}"; }
