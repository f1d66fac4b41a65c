//! The containers of one pod: who is in it, in whose cgroup its processes are, and what they may use
//! together.
//!
//! The first one brings the pod up, the others join it, and the last one takes it down, whichever it
//! is. The pod's processes are in the cgroup of the oldest: when that one goes, they move to the
//! next one's.

use std::path::PathBuf;
use std::sync::{Arc, Weak};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources};
use thiserror::Error;
use tokio::sync::Mutex;

use crate::bundle::{self, BundleError, HostSize, MachineSize};
use crate::cgroup::{Cgroup, CgroupError, Limits};
use crate::machine::agent::AgentError;
use crate::machine::share::ShareDir;
use crate::state::id::ContainerId;
use crate::supervisor::neighbours::{self, Joined};
use crate::supervisor::pod::{Pod, PodError};

/// Why a container is not let in.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// Whoever it wanted to join is gone.
    #[error("the container whose network is joined has ended; start that one first")]
    Over,
    /// One of its neighbours has no process any more.
    #[error("container {0}, whose namespaces are joined, has ended; start that one first")]
    Ended(ContainerId),
    /// No room in it.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The host's limits for the pod.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The guest's limits for the container.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The guest.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// One pod's containers.
#[derive(Debug, Default)]
pub struct Sandbox(Mutex<Members>);

#[derive(Debug, Default)]
struct Members {
    /// The oldest first.
    list: Vec<Member>,
    /// Once it is up, for as long as a container keeps it.
    pod: Weak<Pod>,
    /// The last one has gone.
    over: bool,
}

#[derive(Debug)]
struct Member {
    id: ContainerId,
    cgroup: Cgroup,
    resources: LinuxResources,
    dir: ShareDir,
    /// Its init process, as the guest numbers it, once it has one.
    init: Option<u32>,
}

/// What a container finds.
#[derive(Debug)]
pub struct Admission {
    /// The pod; none for the first one, who brings it up.
    pub pod: Option<Arc<Pod>>,
    /// Where its files go.
    pub dir: ShareDir,
    /// The namespaces that it joins, as the guest names them.
    pub namespaces: Vec<(LinuxNamespaceType, PathBuf)>,
}

/// What a container leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Nobody: the pod is to be taken down.
    Last,
    /// Others; nothing in the pod is its own any more.
    OthersStay,
}

impl Sandbox {
    /// Whether a container has been let in.
    pub async fn has_begun(&self) -> bool {
        !self.0.lock().await.is_new()
    }

    /// Lets a container in: the first of all, or one that joins.
    ///
    /// # Errors
    /// When the pod is over, or has no room.
    pub async fn enter(
        &self,
        id: &ContainerId,
        (cgroup, resources): (&Cgroup, &LinuxResources),
        joined: &Joined,
    ) -> Result<Admission, SandboxError> {
        let mut members = self.0.lock().await;
        let member = |dir| Member {
            id: id.clone(),
            cgroup: cgroup.clone(),
            resources: resources.clone(),
            dir,
            init: None,
        };
        if joined.pod().is_none() && members.is_new() {
            members.list.push(member(ShareDir::default()));
            return Ok(Admission { pod: None, dir: ShareDir::default(), namespaces: Vec::new() });
        }
        let pod = members.pod.upgrade().filter(|_| joined.pod().is_some() && !members.over);
        let pod = pod.ok_or(SandboxError::Over)?;
        let namespaces = members.namespaces(joined)?;
        let dir = pod.take_share_dir()?;
        members.list.push(member(dir));
        let mut room = members.make_room(&pod).await;
        if room.is_ok() {
            // What does not make the machine larger may be more all the same: tasks, or no limit.
            room = members.lower().await.map_err(Into::into);
        }
        if let Err(error) = room {
            members.list.pop();
            // Nothing was shown there.
            let _ = pod.leave_share_dir(dir);
            return Err(error);
        }
        Ok(Admission { pod: Some(pod), dir, namespaces })
    }

    /// Notes the init process of a container that was created, and its pod.
    pub async fn settle(&self, id: &ContainerId, init: u32, pod: &Arc<Pod>) {
        let mut members = self.0.lock().await;
        members.pod = Arc::downgrade(pod);
        if let Some(member) = members.list.iter_mut().find(|member| member.id == *id) {
            member.init = Some(init);
        }
    }

    /// Changes what a container may use, inside, and with it what the pod may on the host. The machine
    /// grows with it; it does not shrink.
    ///
    /// # Errors
    /// When the machine does not grow, or a kernel refuses a limit; on the host it is as it was then.
    pub async fn update(
        &self,
        id: &ContainerId,
        change: &LinuxResources,
        pod: &Pod,
    ) -> Result<(), SandboxError> {
        let mut members = self.0.lock().await;
        let Some(before) = members.merge(id, change) else { return Ok(()) };
        let updated = members.make_true(id, pod).await;
        if updated.is_err() {
            members.restore(id, before);
        }
        members.lower().await?;
        updated
    }

    /// Takes a container out that has ended, or was never created. When others stay, nothing of it is
    /// left in the pod afterwards.
    pub async fn depart(self: &Arc<Self>, id: &ContainerId) -> Departure {
        let mut members = self.0.lock().await;
        let Some(index) = members.find(id) else { return members.departure() };
        let gone = members.list.remove(index);
        if members.list.is_empty() {
            members.over = true;
            return Departure::Last;
        }
        if let Some(pod) = members.pod.upgrade() {
            pod.dismiss(id, gone.dir).await;
            if index == 0
                && let Err(error) = members.move_in(&pod)
            {
                tracing::warn!(error = %error, "the pod's processes did not move to another cgroup");
            }
        }
        // That waits until the guest has given back what it does not need any more.
        let sandbox = self.clone();
        tokio::spawn(async move {
            if let Err(error) = sandbox.0.lock().await.lower().await {
                tracing::warn!(error = %error, "limits of the pod were not changed");
            }
        });
        Departure::OthersStay
    }
}

impl Members {
    /// Whether nobody has ever been here.
    fn is_new(&self) -> bool {
        self.list.is_empty() && !self.over
    }

    fn find(&self, id: &ContainerId) -> Option<usize> {
        self.list.iter().position(|member| member.id == *id)
    }

    fn departure(&self) -> Departure {
        if self.list.is_empty() { Departure::Last } else { Departure::OthersStay }
    }

    /// The namespaces of neighbours, as the guest has them.
    fn namespaces(
        &self,
        joined: &Joined,
    ) -> Result<Vec<(LinuxNamespaceType, PathBuf)>, SandboxError> {
        let of = |(kind, id): (LinuxNamespaceType, &ContainerId)| {
            let member = self.list.iter().find(|member| member.id == *id);
            let init = member.and_then(|member| member.init);
            let init = init.ok_or_else(|| SandboxError::Ended(id.clone()))?;
            Ok((kind, neighbours::of_process(init, kind)))
        };
        joined.inside().map(of).collect()
    }

    /// Changes the limits of a container; gives those that it had.
    fn merge(&mut self, id: &ContainerId, change: &LinuxResources) -> Option<LinuxResources> {
        let member = self.list.iter_mut().find(|member| member.id == *id)?;
        let before = member.resources.clone();
        bundle::merge(&mut member.resources, change);
        Some(before)
    }

    fn restore(&mut self, id: &ContainerId, before: LinuxResources) {
        if let Some(member) = self.list.iter_mut().find(|member| member.id == *id) {
            member.resources = before;
        }
    }

    /// Makes room for what all may use, and has a container's limits inside be what they should.
    async fn make_true(&self, id: &ContainerId, pod: &Pod) -> Result<(), SandboxError> {
        self.make_room(pod).await?;
        let Some(member) = self.list.iter().find(|member| member.id == *id) else { return Ok(()) };
        let json = bundle::resources_for_guest(&member.resources)?;
        Ok(pod.agent.update(id, json).await?)
    }

    /// Makes the machine large enough for all.
    async fn make_room(&self, pod: &Pod) -> Result<(), SandboxError> {
        let size = MachineSize::of(&self.resources(), HostSize::measure());
        if pod.lacks(size).await {
            // Before: memory that is plugged is used at once, to describe it.
            if let Some((cgroup, limits)) = self.cgroup_of_all() {
                cgroup.limit(limits.whole())?;
            }
            pod.grow(size).await?;
        }
        Ok(())
    }

    fn resources(&self) -> Vec<&LinuxResources> {
        self.list.iter().map(|member| &member.resources).collect()
    }

    /// Where the pod's processes are, and what all may use together.
    fn cgroup_of_all(&self) -> Option<(Cgroup, Limits)> {
        let cgroup = self.list.first()?.cgroup.clone();
        Some((cgroup, Limits::of(&bundle::total(&self.resources()))))
    }

    /// Sets what all may use together, once the pod is below it.
    async fn lower(&self) -> Result<(), CgroupError> {
        match self.cgroup_of_all() {
            Some((cgroup, limits)) => cgroup.limit_when_free(&limits).await,
            None => Ok(()),
        }
    }

    /// Moves the pod's processes to where the oldest container's are.
    fn move_in(&self, pod: &Pod) -> Result<(), CgroupError> {
        let Some(oldest) = self.list.first() else { return Ok(()) };
        let helpers = pod.processes().into_iter().map(|process| process.pid);
        helpers.chain([std::process::id()]).try_for_each(|pid| oldest.cgroup.add(pid))
    }
}
