//! How fast guest supervisor code runs on this host: hardware, or a KVM that emulates it.
//!
//! Some virtual machines offer a `/dev/kvm` that runs a guest's user mode natively and everything
//! else in software, hundreds of times slower: no kernel boots there in a useful time. A short loop
//! in real mode, which is supervisor code, tells them apart. Runs in the supervisor, never in the
//! monitor.

// UNSAFETY: a memory slot of the probe's machine is given to KVM by address.
#![expect(unsafe_code, reason = "KVM takes guest memory by address")]

use std::arch::x86_64::__cpuid;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, IntoRawFd};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use std::os::fd::FromRawFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Below this, supervisor code is emulated. Hardware does hundreds of millions, also nested; the
/// emulating hosts that were measured do less than one.
pub const LOOPS_PER_SECOND_MIN: u64 = 10_000_000;
/// Long enough to outweigh entering the guest (some microseconds), short enough to end within
/// 50 ms where it is emulated.
const LOOPS: u16 = 20_000;
/// A measurement that is preempted looks slow, so the best of this many counts.
const ATTEMPTS: u32 = 5;
/// The address of the loop.
const CODE: u64 = 0x1000;
/// `mov cx, LOOPS; loop $; hlt` in 16-bit code.
const PROGRAM: [u8; 6] = {
    let [low, high] = LOOPS.to_le_bytes();
    [0xb9, low, high, 0xe2, 0xfe, 0xf4]
};

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// As fast as a guest should be.
    Hardware,
    /// Emulated in software.
    Emulated {
        /// Turns of the loop per second.
        loops_per_second: u64,
    },
}

/// Why nothing could be measured.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// A call to KVM.
    #[error("{0} failed")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// The probe's memory, or a copy of the descriptor.
    #[error("no resources for the measurement")]
    Resources(#[source] io::Error),
    /// The loop did not end as it should.
    #[error("the measurement's guest stopped with {0}")]
    Stopped(String),
}

/// Whether the processor says that it virtualizes (VMX or SVM), in which case KVM uses it.
#[must_use]
pub fn processor_virtualizes() -> bool {
    let vmx = __cpuid(1).ecx & (1 << 5) != 0;
    let extended = __cpuid(0x8000_0000).eax >= 0x8000_0001;
    vmx || extended && __cpuid(0x8000_0001).ecx & (1 << 2) != 0
}

/// Times the loop, a few times where it is slow; `kvm` is `/dev/kvm`.
///
/// # Errors
/// When KVM cannot run it.
pub fn measure(kvm: &File) -> Result<Speed, ProbeError> {
    let own = kvm.as_fd().try_clone_to_owned().map_err(ProbeError::Resources)?;
    // SAFETY: the descriptor was made right above and is given away.
    let kvm = unsafe { Kvm::from_raw_fd(own.into_raw_fd()) };
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(CODE), 0x1000)])
        .map_err(|error| ProbeError::Resources(io::Error::other(error)))?;
    let write = memory.write_slice(&PROGRAM, GuestAddress(CODE));
    write.map_err(|error| ProbeError::Resources(io::Error::other(error)))?;
    let address = memory
        .get_host_address(GuestAddress(CODE))
        .map_err(|error| ProbeError::Resources(io::Error::other(error)))?;
    let vm = kvm.create_vm().map_err(|error| ProbeError::Kvm("KVM_CREATE_VM", error))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE,
        memory_size: 0x1000,
        userspace_addr: address as u64,
    };
    // SAFETY: the page is mapped until `memory` is dropped, which is after the machine that was made
    // after it.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(|error| ProbeError::Kvm("KVM_SET_USER_MEMORY_REGION", error))?;
    time_loop(&vm)
}

fn time_loop(vm: &kvm_ioctls::VmFd) -> Result<Speed, ProbeError> {
    let mut vcpu = vm.create_vcpu(0).map_err(|error| ProbeError::Kvm("KVM_CREATE_VCPU", error))?;
    let mut sregs = vcpu.get_sregs().map_err(|error| ProbeError::Kvm("KVM_GET_SREGS", error))?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).map_err(|error| ProbeError::Kvm("KVM_SET_SREGS", error))?;
    let mut regs = vcpu.get_regs().map_err(|error| ProbeError::Kvm("KVM_GET_REGS", error))?;
    (regs.rip, regs.rflags) = (CODE, 2);
    let mut best = Duration::MAX;
    for _ in 0..ATTEMPTS {
        vcpu.set_regs(&regs).map_err(|error| ProbeError::Kvm("KVM_SET_REGS", error))?;
        let from = Instant::now();
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => best = best.min(from.elapsed()),
            Ok(exit) => return Err(ProbeError::Stopped(format!("{exit:?}"))),
            Err(error) => return Err(ProbeError::Kvm("KVM_RUN", error)),
        }
        if Speed::of_loops_in(best) == Speed::Hardware {
            break;
        }
    }
    Ok(Speed::of_loops_in(best))
}

impl Speed {
    /// The speed of [`LOOPS`] turns that took this time.
    fn of_loops_in(time: Duration) -> Self {
        let rate = u128::from(LOOPS) * 1_000_000 / time.as_micros().max(1);
        let loops_per_second = u64::try_from(rate).unwrap_or(u64::MAX);
        if loops_per_second < LOOPS_PER_SECOND_MIN {
            Self::Emulated { loops_per_second }
        } else {
            Self::Hardware
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs the test host"]
    fn a_processor_that_virtualizes_is_measured_as_hardware() {
        assert!(processor_virtualizes());
        let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
        assert_eq!(measure(&kvm).unwrap(), Speed::Hardware);
    }

    #[test]
    fn what_is_not_kvm_is_an_error() {
        let other = File::options().read(true).write(true).open("/dev/null").unwrap();
        assert!(matches!(measure(&other), Err(ProbeError::Kvm("KVM_CREATE_VM", _))));
    }

    #[test]
    fn the_rate_tells_hardware_from_emulation() {
        let speed = |micros| Speed::of_loops_in(Duration::from_micros(micros));
        // 20,000 turns.
        assert_eq!(speed(100), Speed::Hardware);
        assert_eq!(speed(0), Speed::Hardware, "faster than the clock ticks");
        assert_eq!(speed(2_000), Speed::Hardware);
        assert_eq!(speed(2_001), Speed::Emulated { loops_per_second: 9_995_002 });
        assert_eq!(speed(30_000), Speed::Emulated { loops_per_second: 666_666 });
    }
}
