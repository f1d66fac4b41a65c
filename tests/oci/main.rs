//! End-to-end tests of the OCI command line, with the real kernel and the real guest. They run in
//! the test host.

#[cfg(test)]
mod activation;
#[cfg(test)]
mod capabilities;
#[cfg(test)]
mod cgroup;
#[cfg(test)]
mod clock;
#[cfg(test)]
mod command_line;
#[cfg(test)]
mod descriptors;
#[cfg(test)]
mod device_rules;
#[cfg(test)]
mod differences;
#[cfg(test)]
mod differential;
#[cfg(test)]
mod disks;
#[cfg(test)]
mod disrepair;
#[cfg(test)]
mod ends;
#[cfg(test)]
mod errors;
#[cfg(test)]
mod exec;
#[cfg(test)]
mod features;
#[cfg(test)]
mod files;
#[cfg(test)]
mod frozen;
#[cfg(test)]
mod growth;
#[cfg(test)]
mod hook_environment;
#[cfg(test)]
mod hooks;
#[cfg(test)]
mod host_formats;
#[cfg(test)]
mod host_sockets;
#[cfg(test)]
mod huge_pages;
#[cfg(test)]
mod ids;
#[cfg(test)]
mod isolation;
#[cfg(test)]
mod kill;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod load;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod modules;
#[cfg(test)]
mod mount_flags;
#[cfg(test)]
mod mounts;
#[cfg(test)]
mod names;
#[cfg(test)]
mod nested;
#[cfg(test)]
mod pause;
#[cfg(test)]
mod pods;
#[cfg(test)]
mod policy;
#[cfg(test)]
mod process;
#[cfg(test)]
mod process_settings;
#[cfg(test)]
mod programs;
#[cfg(test)]
mod read_only_root;
#[cfg(test)]
mod redirected;
#[cfg(test)]
mod resources;
#[cfg(test)]
mod seccomp;
#[cfg(test)]
mod shared_datagrams;
#[cfg(test)]
mod shared_fifos;
#[cfg(test)]
mod shared_files;
#[cfg(test)]
mod shared_sockets;
#[cfg(test)]
mod sizes;
#[cfg(test)]
mod storage;
#[cfg(test)]
mod streams;
#[cfg(test)]
mod supervisor;
#[cfg(test)]
mod swap;
#[cfg(test)]
mod terminal;
#[cfg(test)]
mod terminal_user;
#[cfg(test)]
mod unified;
#[cfg(test)]
mod user_namespace;
#[cfg(test)]
mod volume;
#[cfg(test)]
mod watches;
