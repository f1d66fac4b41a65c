//! One virtual machine, built top to bottom: memory, interrupt controllers, devices, kernel,
//! processors.

use std::fs::File;
use std::io;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{CpuId, KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use thiserror::Error;
use vm_memory::GuestAddress;

use crate::arch::{boot, cpuid, layout, mptable, registers};
use crate::bus::Bus;
use crate::config::{ConfigError, DeviceConfig, Fd, VmConfig};
use crate::control::{DeviceStatistics, Statistics};
use crate::devices::console::Console;
use crate::devices::virtio::balloon::BalloonHandle;
use crate::devices::virtio::mem::{self, MemHandle};
use crate::devices::virtio::net;
use crate::devices::virtio::transport::{QUEUE_NOTIFY, Transport};
use crate::devices::virtio::vsock::Opener;
use crate::devices::{self, Handles};
use crate::memory::{Memory, MemoryError};
use crate::vcpu::{Gate, Vcpus};

/// The machine cannot be built or changed.
#[derive(Debug, Error)]
pub enum VmError {
    /// A field names a descriptor that is taken by another.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An ioctl on /dev/kvm or the machine.
    #[error("KVM: {what}")]
    Kvm {
        /// What was attempted.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// Guest memory cannot be mapped or extended.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// More processors than were declared to the guest.
    #[error("{wanted} processors cannot exist: the machine was started for {declared} at most")]
    Processors {
        /// The number asked for.
        wanted: u8,
        /// The number declared at boot.
        declared: u8,
    },
    /// Memory cannot be plugged.
    #[error("cannot plug {mib} MiB of memory")]
    Plug {
        /// The size asked for.
        mib: u32,
        /// Why not.
        source: io::Error,
    },
    /// Memory of huge pages cannot be plugged.
    #[error("cannot plug {pages} huge pages of 2 MiB")]
    PlugHuge {
        /// The number asked for.
        pages: u32,
        /// Why not.
        source: io::Error,
    },
    /// Kernel, initramfs and boot structures.
    #[error("cannot load the guest")]
    Boot(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A device cannot be made or attached.
    #[error("slot {slot}")]
    Device {
        /// Its slot.
        slot: u8,
        /// Why it failed.
        source: io::Error,
    },
    /// Threads and descriptors of the monitor itself.
    #[error("{what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { what, source }
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Host { what, source }
}

/// The descriptors that came with a message; each is used once.
#[derive(Debug)]
pub(crate) struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    pub(crate) fn new(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors.into_iter().map(Some).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes the descriptor that `field` names.
    pub(crate) fn take(&mut self, field: &str, fd: Fd) -> Result<OwnedFd, ConfigError> {
        let taken = self.0.get_mut(usize::from(fd.0)).and_then(Option::take);
        taken.ok_or_else(|| ConfigError {
            field: field.into(),
            reason: format!("names descriptor {}, which another field has taken", fd.0),
        })
    }
}

/// A machine whose processors wait at the gate until [`Machine::resume`].
#[derive(Debug)]
pub(crate) struct Machine {
    vm: VmFd,
    bus: Arc<Bus>,
    gate: Arc<Gate>,
    vcpus: Vcpus,
    /// How many processors the guest was told about.
    vcpus_max: u8,
    /// The CPUID entries that KVM supports.
    supported: CpuId,
    handles: Handles,
}

impl Machine {
    /// Builds the machine that the configuration describes.
    pub(crate) fn build(config: &VmConfig, mut fds: Descriptors) -> Result<Self, VmError> {
        let kvm_device = open_kvm(fds.take("kvm", config.kvm)?);
        let vm = create_vm(&kvm_device)?;
        let memory = Memory::map(&vm, config.memory_mib)?;
        let console = File::from(fds.take("console", config.console)?);
        let console = Console::new(console).map_err(host("console"))?;
        vm.register_irqfd(console.irq(), layout::SERIAL_IRQ).map_err(kvm("console interrupt"))?;

        let bus = Arc::new(Bus::new(console, Arc::clone(&memory)));
        let mut handles = Handles::default();
        for entry in &config.devices {
            attach(&vm, &bus, &mut handles, (entry.slot, &entry.device), &mut fds)?;
        }

        let memory = memory.snapshot();
        let mut kernel = File::from(fds.take("kernel", config.kernel)?);
        let mut initramfs = File::from(fds.take("initramfs", config.initramfs)?);
        let entry = boot::load(&memory, config, &mut kernel, &mut initramfs)
            .map_err(|error| VmError::Boot(error.into()))?;
        mptable::write(&memory, config.vcpus_max).map_err(|error| VmError::Boot(error.into()))?;
        registers::write_tables(&memory).map_err(|error| VmError::Boot(error.into()))?;

        let gate = Gate::new().map_err(host("gate of the processors"))?;
        let vcpus = Vcpus::new(&gate).map_err(host("signal to the processors"))?;
        let supported = kvm_device
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(kvm("ask for processor features"))?;
        let mut machine =
            Self { vm, bus, gate, vcpus, vcpus_max: config.vcpus_max, supported, handles };
        machine.add_processor(Some(entry))?;
        machine.add_processors(config.vcpus)?;
        Ok(machine)
    }

    /// Creates processors until there are `count`; existing ones are not removed.
    pub(crate) fn add_processors(&mut self, count: u8) -> Result<(), VmError> {
        if count > self.vcpus_max {
            return Err(VmError::Processors { wanted: count, declared: self.vcpus_max });
        }
        while self.vcpus.count() < count {
            self.add_processor(None)?;
        }
        Ok(())
    }

    /// Adds the next processor; the first enters the kernel.
    fn add_processor(&mut self, entry: Option<GuestAddress>) -> Result<(), VmError> {
        let index = self.vcpus.count();
        let place = cpuid::Place { index, of: self.vcpus_max };
        let cpuid = cpuid::for_vcpu(&self.supported, place)
            .map_err(|error| host("features of a processor")(io::Error::other(error)))?;
        let vcpu = create_vcpu(&self.vm, &cpuid, index)?;
        if let Some(entry) = entry {
            registers::set_entry(&vcpu, entry).map_err(|error| VmError::Boot(error.into()))?;
        }
        self.vcpus.add(vcpu, &self.bus).map_err(host("thread of a processor"))
    }

    /// Lets the processors run.
    pub(crate) fn resume(&self) {
        self.vcpus.resume();
    }

    /// Stops the processors; returns when all wait at the gate.
    pub(crate) fn pause(&self) {
        self.vcpus.pause();
    }

    /// The gate, where the processors record why the machine ended.
    pub(crate) fn gate(&self) -> &Gate {
        &self.gate
    }

    pub(crate) fn bus(&self) -> &Bus {
        &self.bus
    }

    /// The handle that opens streams, if the machine has a vsock device.
    pub(crate) fn opener(&self) -> Option<&Opener> {
        self.handles.opener.as_ref()
    }

    /// The handle that sets the balloon's size, if the machine has one.
    pub(crate) fn balloon(&self) -> Option<&BalloonHandle> {
        self.handles.balloon.as_ref()
    }

    /// Lets the guest plug `mib` MiB of memory, in total.
    pub(crate) fn plug(&self, mib: u32) -> Result<(), VmError> {
        let failed = |source| VmError::Plug { mib, source };
        let missing =
            || io::Error::new(io::ErrorKind::NotFound, "the machine has no device for it");
        let mem = self.handles.mem.as_ref().ok_or_else(missing).map_err(failed)?;
        let bytes = mem.region().steps(mib).map_err(failed)?;
        self.bus.memory().extend(&self.vm, mem.region().start, bytes)?;
        self.bus.memory().settle()?;
        mem.request(bytes).map_err(failed)
    }

    /// Lets the guest plug memory of so many huge pages, in total; returns how much memory that is,
    /// in MiB.
    pub(crate) fn plug_huge(&self, pages: u32) -> Result<u32, VmError> {
        let failed = |source| VmError::PlugHuge { pages, source };
        let missing =
            || io::Error::new(io::ErrorKind::NotFound, "the machine has no device for them");
        let mem = self.handles.huge_mem.as_ref().ok_or_else(missing).map_err(failed)?;
        let room = |bytes| mem.region().check(bytes).map_err(failed);
        let memory = self.bus.memory();
        let bytes = memory.extend_huge(&self.vm, mem.region().start, pages, room)?;
        memory.settle()?;
        mem.request(bytes).map_err(failed)?;
        Ok(u32::try_from(bytes >> 20).unwrap_or(u32::MAX))
    }

    /// Attaches a device to a placeholder slot.
    pub(crate) fn attach(
        &mut self,
        slot: u8,
        device: &DeviceConfig,
        fds: &mut Descriptors,
    ) -> Result<(), VmError> {
        attach(&self.vm, &self.bus, &mut self.handles, (slot, device), fds)
    }

    /// Makes a slot a placeholder again.
    pub(crate) fn detach(&mut self, slot: u8) -> Result<(), VmError> {
        let failed = |source| VmError::Device { slot, source };
        let missing =
            || failed(io::Error::new(io::ErrorKind::NotFound, "the slot holds no device"));
        let mut transport = self.bus.slot(slot).ok_or_else(missing)?;
        let device_id = transport.device_id().ok_or_else(missing)?;
        if device_id == mem::DEVICE_ID {
            return Err(failed(io::Error::other("cannot unplug memory")));
        }
        let unwired = unwire(&self.vm, slot, &transport);
        self.handles.forget(device_id);
        drop(transport.detach());
        unwired
    }

    /// Sets the link state of a network device and tells the driver.
    pub(crate) fn set_link(&self, slot: u8, up: bool) -> Result<(), VmError> {
        let failed = |source| VmError::Device { slot, source };
        let transport = self.bus.slot(slot).filter(|it| it.device_id() == Some(net::DEVICE_ID));
        let transport = transport.ok_or_else(|| {
            failed(io::Error::new(io::ErrorKind::NotFound, "the slot holds no network device"))
        })?;
        transport.change_config(|config| net::set_link(config, up)).map_err(failed)
    }

    pub(crate) fn statistics(&self) -> Statistics {
        let device = |slot: u8| {
            let transport = self.bus.slot(slot)?;
            let (line, _) = transport.wiring()?;
            Some(DeviceStatistics {
                slot,
                device_id: transport.device_id()?,
                notifications: line.notifications(),
                failed: line.failed(),
                dropped: line.dropped(),
            })
        };
        Statistics {
            vcpu_exits: self.bus.exits(),
            console_bytes: self.bus.console().bytes(),
            balloon_mib: self.balloon().map(BalloonHandle::actual_mib),
            plugged_mib: self.handles.mem.as_ref().map(MemHandle::plugged_mib),
            devices: (0..crate::config::SLOT_COUNT).filter_map(device).collect(),
        }
    }
}

// UNSAFETY: kvm-ioctls takes over a raw descriptor.
#[expect(unsafe_code, reason = "/dev/kvm arrives as a descriptor, it is never opened here")]
fn open_kvm(device: OwnedFd) -> Kvm {
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor is owned and given up here. If it is not /dev/kvm the ioctls fail.
    unsafe { Kvm::from_raw_fd(device.into_raw_fd()) }
}

/// Creates the machine with its interrupt controllers.
fn create_vm(kvm_device: &Kvm) -> Result<VmFd, VmError> {
    let version = kvm_device.get_api_version();
    if u32::try_from(version) != Ok(kvm_bindings::KVM_API_VERSION) {
        let source = io::Error::other(format!("descriptor `kvm` answers with version {version}"));
        return Err(VmError::Host { what: "KVM is not usable", source });
    }
    let vm = kvm_device.create_vm().map_err(kvm("create machine"))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(kvm("set the address of its own pages"))?;
    vm.create_irq_chip().map_err(kvm("create interrupt controllers"))?;
    disable_counters(&vm)?;
    Ok(vm)
}

/// Disables the performance counters; to be called before there is a processor. AMD's first four
/// exist whatever `cpuid` says, so hiding them is not enough. A KVM older than Linux 5.18 cannot
/// disable them.
fn disable_counters(vm: &VmFd) -> Result<(), VmError> {
    let known = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if u32::try_from(known).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let args = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
    let capability = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, args, ..Default::default() };
    vm.enable_cap(&capability).map_err(kvm("disable performance counters"))
}

/// Creates a processor that does not run yet.
fn create_vcpu(vm: &VmFd, cpuid: &CpuId, index: u8) -> Result<VcpuFd, VmError> {
    let vcpu = vm.create_vcpu(u64::from(index)).map_err(kvm("create processor"))?;
    vcpu.set_cpuid2(cpuid).map_err(kvm("set processor features"))?;
    registers::set_common(&vcpu).map_err(|error| VmError::Boot(error.into()))?;
    Ok(vcpu)
}

/// Attaches a device to a free slot; if that fails, nothing has changed.
fn attach(
    vm: &VmFd,
    bus: &Bus,
    handles: &mut Handles,
    (slot, config): (u8, &DeviceConfig),
    fds: &mut Descriptors,
) -> Result<(), VmError> {
    let failed = |source| VmError::Device { slot, source };
    let missing = || io::Error::new(io::ErrorKind::NotFound, "no such slot");
    let mut transport = bus.slot(slot).ok_or_else(missing).map_err(failed)?;
    // Checked before the device is made, which may change what it uses, such as a tap.
    transport.check_free().and_then(|()| handles.check(config)).map_err(failed)?;
    let (device, brought) = devices::build(config, fds, bus.memory()).map_err(failed)?;
    transport.attach(device).map_err(failed)?;
    if let Err(error) = wire(vm, slot, &transport) {
        // This fails for what was not wired, which is not worth reporting.
        let _ = unwire(vm, slot, &transport);
        drop(transport.detach());
        return Err(error);
    }
    handles.add(brought);
    Ok(())
}

/// Registers with KVM a device's interrupt, and the addresses at which its queues are kicked.
fn wire(vm: &VmFd, slot: u8, transport: &Transport) -> Result<(), VmError> {
    let Some((line, kicks)) = transport.wiring() else { return Ok(()) };
    vm.register_irqfd(line.irq(), layout::slot_irq(slot)).map_err(kvm("device interrupt"))?;
    let notify = IoEventAddress::Mmio(layout::slot_address(slot).0 + QUEUE_NOTIFY);
    for (queue, kick) in (0_u32..).zip(kicks) {
        vm.register_ioevent(kick, &notify, queue).map_err(kvm("device notification"))?;
    }
    Ok(())
}

/// Undoes [`wire`] as far as it can; returns the first error.
fn unwire(vm: &VmFd, slot: u8, transport: &Transport) -> Result<(), VmError> {
    let Some((line, kicks)) = transport.wiring() else { return Ok(()) };
    let notify = IoEventAddress::Mmio(layout::slot_address(slot).0 + QUEUE_NOTIFY);
    let mut unwired = vm.unregister_irqfd(line.irq(), layout::slot_irq(slot));
    for (queue, kick) in (0_u32..).zip(kicks) {
        unwired = unwired.and(vm.unregister_ioevent(kick, &notify, queue));
    }
    unwired.map_err(kvm("device interrupt and notifications"))
}
