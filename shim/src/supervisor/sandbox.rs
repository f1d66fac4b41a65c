//! The containers of one pod: which they are, in which container's cgroup the pod's processes are,
//! and the limits of all containers together.
//!
//! The first container starts the pod, the others join it, and the last to end stops it. The pod's
//! processes are in the cgroup of the oldest container; when that one ends, they move to the cgroup
//! of the next.
//!
//! The list of containers is locked only for a moment. Slow work, such as growing the machine or
//! waiting for memory to be freed, holds another lock, so that containers can come and go
//! meanwhile.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use oci_spec::runtime::{LinuxNamespaceType, LinuxResources};
use thiserror::Error;

use crate::bundle::{self, BundleError, HostSize, MachineSize};
use crate::cgroup::{Cgroup, CgroupError, Limits};
use crate::machine::agent::AgentError;
use crate::machine::share::ShareDir;
use crate::policy::Policy;
use crate::state::id::ContainerId;
use crate::supervisor::neighbours::{self, Joined};
use crate::supervisor::pod::{Pod, PodError};

/// Why a container cannot join a pod or change its limits.
#[derive(Debug, Error)]
pub enum SandboxError {
    /// The pod that it joins has ended.
    #[error("the container whose network is joined has ended; start that one first")]
    Over,
    /// A container whose namespaces it joins has no init process.
    #[error("container {0}, whose namespaces are joined, has ended; start that one first")]
    Ended(ContainerId),
    /// The pod has no room for it.
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
#[derive(Debug)]
pub struct Sandbox {
    policy: Policy,
    members: Mutex<Members>,
    /// Held while the machine or its limits change.
    sizing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Members {
    /// The containers, the oldest first.
    list: Vec<Member>,
    /// Set once the pod is up; valid while a container holds it.
    pod: Weak<Pod>,
    /// The last container has left.
    over: bool,
}

#[derive(Debug)]
struct Member {
    id: ContainerId,
    cgroup: Cgroup,
    resources: LinuxResources,
    dir: ShareDir,
    /// The pid of its init process in the guest, once there is one.
    init: Option<u32>,
}

/// What a container gets when it enters a pod.
#[derive(Debug)]
pub struct Admission {
    /// The pod; `None` for the first container, which starts it.
    pub pod: Option<Arc<Pod>>,
    /// The directory of the share for its files.
    pub dir: ShareDir,
    /// The namespaces that it joins, with their paths in the guest.
    pub namespaces: Vec<(LinuxNamespaceType, PathBuf)>,
}

/// Whether a container that leaves was the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// No container is left: the caller stops the pod.
    Last,
    /// Others stay; nothing in the pod belongs to this container any more.
    OthersStay,
}

impl Sandbox {
    /// A pod without containers.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self { policy, members: Mutex::default(), sizing: tokio::sync::Mutex::default() }
    }

    /// What the pod follows, whoever joins it.
    #[must_use]
    pub const fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Returns whether any container has entered.
    #[must_use]
    pub fn has_begun(&self) -> bool {
        !self.members().is_new()
    }

    /// Returns whether there is at most one container.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.members().list.len() <= 1
    }

    /// Adds a container: the first one, or one that joins.
    ///
    /// # Errors
    /// When the pod has ended, a joined container has ended, there is no room, or the machine
    /// cannot grow.
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
            // Fails, since nothing was attached there yet; the directory is free again all the
            // same.
            let _ = pod.leave_share_dir(admission.dir);
            return Err(error);
        }
        Ok(admission)
    }

    /// Records the pod that the first container has started, and takes that container's directory
    /// in the share.
    ///
    /// # Errors
    /// Never in practice: all directories of the share are free.
    pub fn is_up(&self, pod: &Arc<Pod>) -> Result<(), SandboxError> {
        let mut members = self.members();
        if let Some(first) = members.list.first_mut() {
            first.dir = pod.take_share_dir()?;
        }
        members.pod = Arc::downgrade(pod);
        Ok(())
    }

    /// Records the init process of a container that was created.
    pub fn settle(&self, id: &ContainerId, init: u32) {
        if let Some(member) = self.members().find(id) {
            member.init = Some(init);
        }
    }

    /// Changes the limits of a container in the guest, and with them the limits of the pod on the
    /// host. The machine grows with them; it does not shrink.
    ///
    /// # Errors
    /// When the machine does not grow, or a kernel refuses a limit. If the machine or the guest
    /// fails, the limits on the host are those from before.
    pub async fn update(
        &self,
        id: &ContainerId,
        change: &LinuxResources,
        pod: &Pod,
    ) -> Result<(), SandboxError> {
        let _sizing = self.sizing.lock().await;
        let Some((before, after)) = self.members().merge(id, change) else { return Ok(()) };
        let updated = async {
            bundle::check_swap(&after).map_err(BundleError::from)?;
            bundle::check_huge_pages(&after).map_err(BundleError::from)?;
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

    /// Removes a container that has ended or was never created. If others stay, nothing of it is
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
        // This waits until the guest has returned memory that it does not need any more.
        let sandbox = self.clone();
        tokio::spawn(async move {
            let _sizing = sandbox.sizing.lock().await;
            if let Err(error) = sandbox.lower().await {
                tracing::warn!(error = %error, "cannot change the limits of the pod");
            }
        });
        Departure::OthersStay
    }

    /// Makes the machine large enough for all containers, and sets the limits on the host to what
    /// they may use together.
    async fn resize(&self, pod: &Pod) -> Result<(), SandboxError> {
        let _sizing = self.sizing.lock().await;
        self.make_room(pod).await?;
        // Also if the machine does not grow: limits that do not change its size may be higher now,
        // such as the number of tasks, or none.
        Ok(self.lower().await?)
    }

    /// Gives a machine that has just booted what it cannot boot with: huge pages and swap. The host's
    /// limits are those of the boot, and are high enough.
    ///
    /// # Errors
    /// When the machine does not grow.
    pub async fn complete(&self, pod: &Pod) -> Result<(), SandboxError> {
        let _sizing = self.sizing.lock().await;
        pod.grow(self.size()).await?;
        self.provide_swap(pod).await;
        Ok(())
    }

    /// The size of a machine for all containers.
    fn size(&self) -> MachineSize {
        MachineSize::of(&self.members().resources(), HostSize::measure(), self.policy.size)
    }

    /// Makes the machine large enough for all containers.
    async fn make_room(&self, pod: &Pod) -> Result<(), SandboxError> {
        let size = self.size();
        if pod.lacks(size).await {
            // The limit is raised first: the guest uses some of the plugged memory at once, to
            // describe it.
            if let Some((cgroup, limits)) = self.cgroup_of_all().await {
                cgroup.limit_async(limits.whole().clone()).await?;
            }
            pod.grow(size).await?;
        }
        self.provide_swap(pod).await;
        Ok(())
    }

    /// Gives the machine the swap that its containers may use. One that gets less runs out of memory
    /// earlier, as on a host with less swap.
    async fn provide_swap(&self, pod: &Pod) {
        let host_mib = bundle::swap_of_the_host();
        let wanted = bundle::swap_mib(&self.members().resources(), host_mib);
        if let Err(error) = pod.provide_swap(wanted, host_mib).await {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the containers have less swap than they may use"
            );
        }
    }

    /// Sets the limits of all containers together on the host, once the pod uses less.
    async fn lower(&self) -> Result<(), CgroupError> {
        match self.cgroup_of_all().await {
            Some((cgroup, limits)) => cgroup.limit_when_free(&limits).await,
            None => Ok(()),
        }
    }

    /// Returns the cgroup of the pod's processes and the limits of all containers together.
    async fn cgroup_of_all(&self) -> Option<(Cgroup, Limits)> {
        let (cgroup, mut resources, pod) = {
            let members = self.members();
            let cgroup = members.list.first()?.cgroup.clone();
            (cgroup, bundle::total(&members.resources()), members.pod.upgrade())
        };
        if let Some(pod) = pod {
            // The machine keeps those of containers that have left.
            bundle::allow_huge_pages(&mut resources, pod.huge_pages().await);
        }
        Some((cgroup, Limits::of(&resources)))
    }

    /// Moves the pod's processes to the cgroup of the oldest container.
    async fn move_in(&self, pod: &Pod) -> Result<(), CgroupError> {
        let oldest = self.members().list.first().map(|oldest| oldest.cgroup.clone());
        let Some(cgroup) = oldest else { return Ok(()) };
        let helpers = pod.processes().into_iter().map(|process| process.pid);
        let all: Vec<_> = helpers.chain([std::process::id()]).collect();
        cgroup.add_async(all).await
    }

    fn members(&self) -> MutexGuard<'_, Members> {
        // Nothing panics while it holds the lock, so the list is consistent.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Members {
    /// Returns whether no container has entered yet.
    fn is_new(&self) -> bool {
        self.list.is_empty() && !self.over
    }

    /// Adds a container; returns the pod too, which may have to grow for it.
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

    /// Removes a container; returns it, whether it was the oldest, and the pod if others stay.
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

    /// Returns the paths of joined namespaces in the guest.
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

    /// Changes the limits of a container; returns the old and the new limits.
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
