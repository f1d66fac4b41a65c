//! What the guest sees beside its processors and memory.

use std::fs::File;
use std::io;

use crate::config::DeviceConfig;
use crate::vm::Descriptors;

pub(crate) mod console;
pub(crate) mod rate_limit;
pub(crate) mod virtio;

use virtio::VirtioDevice;
use stub::{balloon, block, fs};
use virtio::{rng, vsock};

/// What the control socket needs of devices once they are attached.
#[derive(Debug, Default)]
pub(crate) struct Handles {
    /// Opens streams to the guest.
    pub(crate) opener: Option<vsock::Opener>,
}

/// Makes the device that the configuration describes.
pub(crate) fn build(
    config: &DeviceConfig,
    fds: &mut Descriptors,
    handles: &mut Handles,
) -> io::Result<Box<dyn VirtioDevice>> {
    let mut take = |field, fd| fds.take(field, fd).map_err(io::Error::other);
    Ok(match config {
        DeviceConfig::Vsock { guest_cid } => {
            let (device, opener) = vsock::device(*guest_cid)?;
            handles.opener = Some(opener);
            Box::new(device)
        }
        DeviceConfig::Rng { source } => Box::new(rng::device(File::from(take("source", *source)?))),
        DeviceConfig::Fs { tag, server } => {let _=tag;take("server", *server)?;Box::new(fs::dev())},
        DeviceConfig::Blk { disk, read_only, serial } => {
            {let _=(read_only,serial);take("disk", *disk)?;Box::new(block::dev())}
        }
        DeviceConfig::Balloon => Box::new(balloon::dev()),
    })
}

pub(crate) mod stub {
    macro_rules! stub { ($name:ident, ($($t:ty),*)) => { pub(crate) mod $name {
        use std::io;use std::fs::File;use std::os::fd::OwnedFd;use super::super::virtio::*;
        #[derive(Debug)] pub(crate) struct S; impl Serve for S { const NAME:&'static str="stub"; const SYSCALLS:&'static [i64]=&[];
          fn serve(&mut self,_:Ready,_:&mut Context<'_>)->Result<(),ServeError>{Ok(())} }
        pub(crate) fn dev()->Device<S>{Device::new(Identity{device_id:0,features:0,queue_sizes:&[]},ConfigSpace::read_only(vec![]),S)}
        pub(crate) struct OpenRequest{pub port:u32,pub deadline:std::time::Instant,pub answer:Box<dyn FnOnce(Result<OwnedFd,String>)+Send>}
        #[derive(Debug,Clone)] pub(crate) struct Opener; impl Opener{pub fn open(&self,_:OpenRequest){}}
        $(pub(crate) type T=$t;)*
    } } }
    stub!(fs,());stub!(block,());stub!(balloon,());
}
