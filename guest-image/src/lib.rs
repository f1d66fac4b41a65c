//! Builds what a pod boots: the kernel with its modules, and the initramfs. It needs neither root nor a network, only
//! the source package that is installed on the machine.
//!
//! A kernel is `make tinyconfig` plus a fragment, verified option by option. It is kept in the
//! cache under the hash of all its inputs. The same code builds the test host's kernel from another
//! fragment. The initramfs is a cpio archive that is written here, with the same bytes each time.

pub mod cache;
pub mod elf;
pub mod initramfs;
pub mod kconfig;
pub mod kernel;
pub mod modules;
pub mod progress;
pub mod source;
