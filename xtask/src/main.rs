//! The entry point for developers: `cargo xtask VERB`. Each verb has its own file; this one only
//! dispatches.

mod cargo;
mod check;
mod clock;
mod debian_image;
mod demo;
mod figures;
mod fuzz;
mod host;
mod image;
mod libtest;
mod packages;
mod report;
mod suites;
mod test;
mod tidy;
mod week_image;

use std::env;
use std::process::ExitCode;

use anyhow::Result;
use guest_image::progress::say;

use crate::clock::Clock;

const USAGE: &str = "usage: cargo xtask VERB
  demo                    run a container in its own machine and compare what it sees with the host
  test [--suite NAME [TEST…]]
                          all tests, here and in the test host; with --suite those of one suite (vm, oci,
                          callers, …) or package, or of these the ones whose names contain TEST
  check [NAME]            format, clippy, documentation, rules of the repository
  fuzz [TARGET] [SECONDS] programs that play a hostile guest, guided by what they reach; with the name of
                          a file in place of SECONDS, what was found once again
  bench [ARGUMENTS]       the benchmark, in the test host; its JSON goes to target/bench
  image                   build everything and lay it out in target/dist
  debian                  make the Debian image that the suites use, or find it in the cache
  host [OPTIONS] [CMD]    a command, or a shell, in the test host (--help tells the options)";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let clock = Clock::new();
    let result = match arguments.split_first() {
        Some((verb, rest)) => run(verb, rest, &clock),
        None => usage(),
    };
    clock.report();
    result.unwrap_or_else(|error| {
        say(&format!("error: {error:#}"));
        ExitCode::FAILURE
    })
}

fn run(verb: &str, rest: &[String], clock: &Clock) -> Result<ExitCode> {
    match verb {
        "demo" => demo::run(clock),
        demo::INSIDE => demo::inside(),
        "test" => test::run(rest, clock),
        "check" => check::run(rest, clock),
        "fuzz" => fuzz::run(rest, clock),
        "bench" => host::bench(rest, clock),
        "image" => image::build(clock).map(|()| ExitCode::SUCCESS),
        "debian" => debian_image::build().map(|()| ExitCode::SUCCESS),
        "host" => host::run(rest),
        _ => usage(),
    }
}

fn usage() -> Result<ExitCode> {
    say(USAGE);
    Ok(ExitCode::FAILURE)
}
