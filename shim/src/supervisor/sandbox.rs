//! The containers of one pod: who is in it, in whose cgroup its processes are, and what they may use
//! together.
//!
//! The first one brings the pod up, the others join it, and the last one takes it down, whichever it
//! is. The pod's processes are in the cgroup of the oldest: when that one goes, they move to the
//! next one's.
//!
//! Who is in it is known at once, always. What takes time, such as a machine that grows or memory that
//! comes back, is done without keeping anybody from coming or going.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources};
use thiserror::Error;

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
pub struct Sandbox {
    members: Mutex<Members>,
    /// Held while the machine or its limits change.
    sizing: tokio::sync::Mutex<()>,
}

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
    #[must_use]
    pub fn has_begun(&self) -> bool {
        !self.members().is_new()
    }

    /// Whether there is one container at most.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.members().list.len() <= 1
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
        let (cgroup, resources) = (cgroup.clone(), resources.clone());
        let member = |dir| Member { id: id.clone(), cgroup, resources, dir, init: None };
        let (admission, pod) = self.members().admit(member, joined)?;
        if let Some(pod) = pod
            && let Err(error) = self.resize(&pod).await
        {
            self.members().list.retain(|member| member.id != *id);
            // Nothing was shown there.
            let _ = pod.leave_share_dir(admission.dir);
            return Err(error);
        }
        Ok(admission)
    }

    /// Notes the pod that the first container has brought up; its directory in the share is taken now.
    ///
    /// # Errors
    /// Never in practice: the share is empty.
    pub fn is_up(&self, pod: &Arc<Pod>) -> Result<(), SandboxError> {
        let mut members = self.members();
        if let Some(first) = members.list.first_mut() {
            first.dir = pod.take_share_dir()?;
        }
        members.pod = Arc::downgrade(pod);
        Ok(())
    }

    /// Notes the init process of a container that was created.
    pub fn settle(&self, id: &ContainerId, init: u32) {
        if let Some(member) = self.members().find(id) {
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
        let _sizing = self.sizing.lock().await;
        let Some((before, after)) = self.members().merge(id, change) else { return Ok(()) };
        let updated = async {
            self.make_room(pod).await?;
            let json = bundle::resources_for_guest(&after)?;
            Ok(pod.agent.update(id, json).await?)
        };
        let updated = updated.await;
        if updated.is_err()
            && let Some(member) = self.members().find(id)
        {
            member.resources = before;
        }
        self.lower().await?;
        updated
    }

    /// Takes a container out that has ended, or was never created. When others stay, nothing of it is
    /// left in the pod afterwards.
    pub async fn depart(self: &Arc<Self>, id: &ContainerId) -> Departure {
        let Some((gone, was_oldest, pod)) = self.members().remove(id) else {
            return if self.members().list.is_empty() {
                Departure::Last
            } else {
                Departure::OthersStay
            };
        };
        let Some(pod) = pod else { return Departure::Last };
        pod.dismiss(id, gone.dir).await;
        if was_oldest && let Err(error) = self.move_in(&pod).await {
            tracing::warn!(error = %error, "cannot move the pod's processes to another cgroup");
        }
        // That waits until the guest has given back what it does not need any more.
        let sandbox = self.clone();
        tokio::spawn(async move {
            let _sizing = sandbox.sizing.lock().await;
            if let Err(error) = sandbox.lower().await {
                tracing::warn!(error = %error, "cannot change the limits of the pod");
            }
        });
        Departure::OthersStay
    }

    /// Makes the machine large enough for all, and the limits on the host what all may use.
    async fn resize(&self, pod: &Pod) -> Result<(), SandboxError> {
        let _sizing = self.sizing.lock().await;
        self.make_room(pod).await?;
        // What does not make the machine larger may be more all the same: tasks, or no limit.
        Ok(self.lower().await?)
    }

    /// Makes the machine large enough for all.
    async fn make_room(&self, pod: &Pod) -> Result<(), SandboxError> {
        let size = MachineSize::of(&self.members().resources(), HostSize::measure());
        if pod.lacks(size).await {
            // Before: memory that is plugged is used at once, to describe it.
            if let Some((cgroup, limits)) = self.cgroup_of_all() {
                cgroup.limit_async(limits.whole().clone()).await?;
            }
            pod.grow(size).await?;
        }
        Ok(())
    }

    /// Sets what all may use together, once the pod is below it.
    async fn lower(&self) -> Result<(), CgroupError> {
        match self.cgroup_of_all() {
            Some((cgroup, limits)) => cgroup.limit_when_free(&limits).await,
            None => Ok(()),
        }
    }

    /// Where the pod's processes are, and what all may use together.
    fn cgroup_of_all(&self) -> Option<(Cgroup, Limits)> {
        let members = self.members();
        let cgroup = members.list.first()?.cgroup.clone();
        Some((cgroup, Limits::of(&bundle::total(&members.resources()))))
    }

    /// Moves the pod's processes to where the oldest container's are.
    async fn move_in(&self, pod: &Pod) -> Result<(), CgroupError> {
        let oldest = self.members().list.first().map(|oldest| oldest.cgroup.clone());
        let Some(cgroup) = oldest else { return Ok(()) };
        let helpers = pod.processes().into_iter().map(|process| process.pid);
        let all: Vec<_> = helpers.chain([std::process::id()]).collect();
        cgroup.add_async(all).await
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        // Nothing panics while it holds the lock, so the list is whole.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Members {
    /// Whether nobody has ever been here.
    fn is_new(&self) -> bool {
        self.list.is_empty() && !self.over
    }

    /// Lets a container in; gives the pod, which may have to grow for it.
    fn admit(
        &mut self,
        member: impl FnOnce(ShareDir) -> Member,
        joined: &Joined,
    ) -> Result<(Admission, Option<Arc<Pod>>), SandboxError> {
        if joined.pod().is_none() && self.is_new() {
            let dir = ShareDir::default();
            self.list.push(member(dir));
            return Ok((Admission { pod: None, dir, namespaces: Vec::new() }, None));
        }
        let pod = self.pod.upgrade().filter(|_| joined.pod().is_some() && !self.over);
        let pod = pod.ok_or(SandboxError::Over)?;
        let namespaces = self.namespaces(joined)?;
        let dir = pod.take_share_dir()?;
        self.list.push(member(dir));
        Ok((Admission { pod: Some(pod.clone()), dir, namespaces }, Some(pod)))
    }

    /// Takes a container out: what it was, whether it was the oldest, and the pod if others stay.
    fn remove(&mut self, id: &ContainerId) -> Option<(Member, bool, Option<Arc<Pod>>)> {
        let index = self.list.iter().position(|member| member.id == *id)?;
        let gone = self.list.remove(index);
        self.over = self.list.is_empty();
        let pod = if self.over { None } else { self.pod.upgrade() };
        Some((gone, index == 0, pod))
    }

    fn find(&mut self, id: &ContainerId) -> Option<&mut Member> {
        self.list.iter_mut().find(|member| member.id == *id)
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

    /// Changes the limits of a container; gives those that it had, and has.
    fn merge(
        &mut self,
        id: &ContainerId,
        change: &LinuxResources,
    ) -> Option<(LinuxResources, LinuxResources)> {
        let member = self.find(id)?;
        let before = member.resources.clone();
        bundle::merge(&mut member.resources, change);
        Some((before, member.resources.clone()))
    }

    fn resources(&self) -> Vec<&LinuxResources> {
        self.list.iter().map(|member| &member.resources).collect()
    }
}
