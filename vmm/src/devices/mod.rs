//! The devices that the guest sees beside its processors and memory.

use std::fs::File;
use std::io;

use crate::arch::layout;
use crate::config::{DeviceConfig, Fd};
use crate::memory::Memory;
use crate::vm::Descriptors;

pub(crate) mod console;
pub(crate) mod rate_limit;
mod token_bucket;
pub(crate) mod virtio;

use virtio::{VirtioDevice, balloon, block, fs, mem, net, rng, vsock};

/// What the control socket needs of attached devices. A machine has at most one of each.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    /// Opens streams to the guest.
    pub(crate) opener: Option<vsock::Opener>,
    /// Sets the balloon's size.
    pub(crate) balloon: Option<balloon::BalloonHandle>,
    /// Sets how much memory is plugged.
    pub(crate) mem: Option<mem::MemHandle>,
    /// Sets how much memory of huge pages is plugged.
    pub(crate) huge_mem: Option<mem::MemHandle>,
}

impl Handles {
    /// Refuses a device if the machine has one already and can have only one.
    pub(crate) fn check(&self, config: &DeviceConfig) -> io::Result<()> {
        let taken = match config {
            DeviceConfig::Vsock { .. } if self.opener.is_some() => "a vsock device",
            DeviceConfig::Balloon if self.balloon.is_some() => "a balloon",
            DeviceConfig::Mem { .. } if self.mem.is_some() => "a memory device",
            DeviceConfig::HugeMem { .. } if self.huge_mem.is_some() => {
                "a device for memory of huge pages"
            }
            _ => return Ok(()),
        };
        Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("the machine has {taken}")))
    }

    /// Adds the handles of a device that was attached.
    pub(crate) fn add(&mut self, brought: Self) {
        self.opener = brought.opener.or(self.opener.take());
        self.balloon = brought.balloon.or(self.balloon.take());
        self.mem = brought.mem.or(self.mem.take());
        self.huge_mem = brought.huge_mem.or(self.huge_mem.take());
    }

    /// Removes the handle of a device of this type, which was detached.
    pub(crate) fn forget(&mut self, device_id: u32) {
        match device_id {
            vsock::DEVICE_ID => self.opener = None,
            balloon::DEVICE_ID => self.balloon = None,
            _ => {}
        }
    }
}

/// Makes the configured device and its handles; `memory` is the machine's.
pub(crate) fn build(
    config: &DeviceConfig,
    fds: &mut Descriptors,
    memory: &Memory,
) -> io::Result<(Box<dyn VirtioDevice>, Handles)> {
    let mut take = |field, fd| fds.take(field, fd).map_err(io::Error::other);
    let mut brings = Handles::default();
    let device: Box<dyn VirtioDevice> = match config {
        DeviceConfig::Vsock { guest_cid } => {
            let (device, opener) = vsock::device(*guest_cid)?;
            brings.opener = Some(opener);
            Box::new(device)
        }
        DeviceConfig::Rng { source } => Box::new(rng::device(File::from(take("source", *source)?))),
        DeviceConfig::Fs { tag, server } => Box::new(fs::device(tag, take("server", *server)?)),
        DeviceConfig::Blk { disk, read_only, serial } => {
            let disk = File::from(take("disk", *disk)?);
            Box::new(block::device(disk, *read_only, serial)?)
        }
        DeviceConfig::Net(net) => {
            let mut all = |field, fds: &[Fd]| fds.iter().map(|fd| take(field, *fd)).collect();
            let taps: io::Result<_> = all("taps", &net.taps);
            let vhost: io::Result<_> = all("vhost", &net.vhost);
            Box::new(net::device(net, (taps?, vhost?), memory)?)
        }
        DeviceConfig::Balloon => {
            let (device, balloon) = balloon::device()?;
            brings.balloon = Some(balloon);
            Box::new(device)
        }
        DeviceConfig::Mem { region_mib } => {
            let (start, step) = layout::plugged_memory(memory.end_at_boot());
            let region = mem::Region::new(start, step, *region_mib);
            let (device, mem) = mem::device(region)?;
            brings.mem = Some(mem);
            Box::new(device)
        }
        DeviceConfig::HugeMem { region_mib, behind_mib } => {
            let (start, step) = layout::plugged_memory(memory.end_at_boot());
            let start = mem::Region::new(start, step, *behind_mib).end();
            let (device, mem) = mem::device(mem::Region::new(start, step, *region_mib))?;
            brings.huge_mem = Some(mem);
            Box::new(device)
        }
    };
    Ok((device, brings))
}
