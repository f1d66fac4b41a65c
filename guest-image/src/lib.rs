//! Builds what a pod boots: the kernel and the initramfs. Needs no root, and no network beyond the
//! source package that the machine already has.
//!
//! A kernel is `make tinyconfig` plus a fragment, verified option by option, and kept in the cache
//! under the hash of everything that went into it. The test host's kernel is built by the same code
//! from its own fragment. The initramfs is a cpio archive written here, the same bytes each time.

pub mod cache;
pub mod elf;
pub mod initramfs;
pub mod kconfig;
pub mod kernel;
pub mod progress;
pub mod source;
