# shellcheck shell=bash
# What every job script sources: the other parts, and the site's own settings.
#
# A script is at work in one of two places: on the login node, where it checks the settings and says
# what it would do, or on the first node of an allocation, where it does it.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
LIB=$REPO/slurm/lib
IS_JOB=${SLURM_JOB_ID:+1}
export PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH} # also for the workers on all nodes

say() { echo "$(date +%H:%M:%S) slurm: $*"; }

# Partition, modules, interface and folders of this cluster; see site.sh.example.
SITE=${SITE:-$REPO/slurm/site.sh}
if [[ -e $SITE ]]; then
    # shellcheck source=/dev/null
    source "$SITE"
fi

# shellcheck source=slurm/lib/settings.sh
source "$LIB/settings.sh"
# shellcheck source=slurm/lib/platform.sh
source "$LIB/platform.sh"
# shellcheck source=slurm/lib/nodes.sh
source "$LIB/nodes.sh"
# shellcheck source=slurm/lib/stages.sh
source "$LIB/stages.sh"
# shellcheck source=slurm/lib/requeue.sh
source "$LIB/requeue.sh"
# shellcheck source=slurm/lib/ray.sh
source "$LIB/ray.sh"
# shellcheck source=slurm/lib/train.sh
source "$LIB/train.sh"
# shellcheck source=slurm/lib/single.sh
source "$LIB/single.sh"
