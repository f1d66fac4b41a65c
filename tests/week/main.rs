//! An ordinary week: programs of Debian as their users use them. Each is started, worked with,
//! stopped, restarted and killed under runc and under Bulkhead, in containers with the same root
//! file system, and must do the same. How long each took is printed at the end and never judged.
//!
//! `cargo xtask test --suite week` runs all of it; a run of everything leaves out what is ignored.

#![cfg(test)]

mod compilers;
mod copies;
mod cron;
mod engines;
mod git;
mod java;
mod lan;
mod mariadb;
mod nginx;
mod node;
mod others;
mod postgresql;
mod python;
mod redis;
mod room;
mod servers;
mod sqlite;
mod systemd;
mod table;
mod tracers;
