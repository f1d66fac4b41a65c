//! The command line: runc's verbs and flags, for callers that know runc.
//!
//! Flags that mean something to runc only are taken and change nothing; each says so.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Command, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::logging::{LogLevel, LogTarget};
use crate::state::id::ContainerId;

/// Where containers are kept unless `--root` says otherwise.
pub const ROOT: &str = "/run/bulkhead";

/// The answer to `--version`, in runc's layout.
const VERSION: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: ", "1.0.2");
/// Help, in runc's layout.
const HELP: &str = "NAME:\n   {name} - {about}\n\nUSAGE:\n   bulkhead [global options] command \
                    [command options] [arguments...]\n\nCOMMANDS:\n{subcommands}\n\nGLOBAL \
                    OPTIONS:\n{options}";

/// The command line, with help and version in runc's layout.
#[must_use]
pub fn command() -> Command {
    let command = CommandLine::command().help_template(HELP);
    let names: Vec<_> = command.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    names.into_iter().fold(command, |command, name| {
        let help = format!(
            "NAME:\n   bulkhead {name} - {{about}}\n\nUSAGE:\n   {{usage}}\n\nOPTIONS:\n{{options}}"
        );
        command.mut_subcommand(&name, |verb| verb.args_override_self(true).help_template(help))
    })
}

/// Runs OCI containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version = VERSION, disable_version_flag = true)]
#[command(args_override_self = true)]
pub struct CommandLine {
    /// What applies to every verb.
    #[command(flatten)]
    pub global: Global,
    /// Print the version.
    #[arg(short, long, action = ArgAction::Version)]
    pub version: (),
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options before the verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Directory that holds the state of all containers (best on a tmpfs).
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub root: PathBuf,
    /// File for log lines; standard error without it.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// What log lines look like.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
    /// Log everything.
    #[arg(long)]
    pub debug: bool,
    /// The section of the policy that applies; the name of this program without it.
    #[arg(long, value_name = "NAME")]
    pub runtime_name: Option<String>,
    /// The pod's cgroup is a unit of systemd; cgroupsPath is "slice:prefix:name" then.
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Taken and ignored.
    #[arg(long, value_name = "BOOL", hide = true)]
    pub rootless: Option<String>,
    /// Taken and ignored.
    #[arg(long, value_name = "PATH", hide = true)]
    pub criu: Option<PathBuf>,
}

impl Verb {
    /// How many descriptors of the caller a container's process gets beyond its standard streams.
    #[must_use]
    pub const fn preserved(&self) -> u32 {
        match self {
            Self::Run(run) => run.create.preserve_fds,
            Self::Create(create) => create.preserve_fds,
            Self::Exec(exec) => exec.preserve_fds,
            _ => 0,
        }
    }
}

impl Global {
    /// Where log lines go, and which: all with `--debug`.
    #[must_use]
    pub fn log_target(&self, level: LogLevel) -> LogTarget {
        LogTarget {
            // The supervisor works in another directory.
            path: self.log.as_ref().map(|path| std::path::absolute(path).unwrap_or(path.clone())),
            json: self.log_format == LogFormat::Json,
            level: if self.debug { LogLevel::Debug } else { level },
        }
    }
}

/// The forms of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// `time="…" level=error msg="…"`.
    Text,
    /// `{"level":"error","msg":"…","time":"…"}`.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a container, start it, wait for its end and delete it.
    Run(Run),
    /// Create a container; "start" starts its program.
    Create(Create),
    /// Start the program of a created container.
    Start(Named),
    /// Show the state of a container as JSON.
    State(Named),
    /// Send a signal to a container's init process (SIGTERM without one).
    Kill(Kill),
    /// Run a further process in a container.
    Exec(Box<Exec>),
    /// Freeze all processes of a container.
    Pause(Named),
    /// Resume all processes of a paused container.
    Resume(Named),
    /// Change the limits of a container.
    Update(Box<Update>),
    /// List the processes of a container.
    Ps(Ps),
    /// Show a container's resource usage and out-of-memory events.
    Events(Events),
    /// Show the features of this runtime.
    Features,
    /// Show the policy of the host for this runtime, and where each value is from.
    Config,
    /// Remove a container that does not run.
    Delete(Delete),
    /// List all containers.
    List(List),
    /// Write a default config.json.
    Spec(Spec),
    /// The process behind each pod.
    #[command(hide = true)]
    Supervise {
        /// The pod's state directory, for `ps` to show: the orders come over a socket.
        pod: PathBuf,
    },
    /// The process that is killed so that the host counts a kill.
    #[command(hide = true)]
    OomVictim,
    /// Not supported yet.
    #[command(hide = true, disable_help_flag = true)]
    Checkpoint {
        /// Whatever runc takes.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        line: Vec<String>,
    },
    /// Not supported yet.
    #[command(hide = true, disable_help_flag = true)]
    Restore {
        /// Whatever runc takes.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        line: Vec<String>,
    },
    /// A word that is no verb.
    #[command(external_subcommand)]
    Other(Vec<String>),
}

/// One container.
#[derive(Debug, Args)]
pub struct Named {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
}

/// Options of `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
    /// Show the usage once, then exit.
    #[arg(long)]
    pub stats: bool,
    /// Interval between two reports, such as 500ms, 5s or 1m.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = interval)]
    pub interval: Duration,
}

/// A time as Go writes it, of one unit.
fn interval(text: &str) -> Result<Duration, String> {
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let milliseconds = match unit {
        "" if number == "0" => 0,
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("write a number with ms, s, m or h".to_owned()),
    };
    let number: u64 = number.parse().map_err(|_| "write a number with ms, s, m or h".to_owned())?;
    Ok(Duration::from_millis(number.saturating_mul(milliseconds)))
}

/// Options of `update`. A size is a number of bytes, or one with a unit such as 64m.
#[derive(Debug, Args)]
pub struct Update {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
    /// File with the limits as a "linux.resources" object, - for standard input; other flags then
    /// mean nothing.
    #[arg(long, short, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Memory.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory: Option<String>,
    /// Memory and swap together; -1 for no limit.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory_swap: Option<String>,
    /// Memory reservation, a soft limit.
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    pub memory_reservation: Option<String>,
    /// Taken and ignored: the kernel's memory has no limit of its own.
    #[arg(long, value_name = "SIZE", hide = true, allow_hyphen_values = true)]
    pub kernel_memory: Option<String>,
    /// Taken and ignored, as that.
    #[arg(long, value_name = "SIZE", hide = true, allow_hyphen_values = true)]
    pub kernel_memory_tcp: Option<String>,
    /// CPU quota, in microseconds for each period; -1 for no limit.
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    /// Length of a period, in microseconds.
    #[arg(long, value_name = "US")]
    pub cpu_period: Option<u64>,
    /// CPU shares, a weight relative to other containers.
    #[arg(long, value_name = "SHARES")]
    pub cpu_share: Option<u64>,
    /// Realtime CPU runtime, in microseconds for each period.
    #[arg(long, value_name = "US", allow_hyphen_values = true)]
    pub cpu_rt_runtime: Option<i64>,
    /// Length of a realtime period, in microseconds.
    #[arg(long, value_name = "US")]
    pub cpu_rt_period: Option<u64>,
    /// CPUs of the host that may be used, such as 0-3.
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes of the host that may be used.
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Most processes and threads; -1 for no limit.
    #[arg(long, value_name = "NUMBER", allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    /// Weight of block I/O, 10 to 1000.
    #[arg(long, value_name = "WEIGHT")]
    pub blkio_weight: Option<u16>,
    /// Not supported.
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub l3_cache_schema: Option<String>,
    /// Not supported.
    #[arg(long, value_name = "SCHEMA", hide = true)]
    pub mem_bw_schema: Option<String>,
}

/// Options of `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
    /// The program and its arguments.
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
    /// File with the "process" object of a specification, instead of a command.
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Working directory; the container's without it.
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// A variable of the environment; may be repeated.
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Allocate a terminal for the process.
    #[arg(short, long)]
    pub tty: bool,
    /// Socket for the terminal's master, if this process does not stay.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// User and group, as numbers.
    #[arg(short, long, value_name = "UID[:GID]")]
    pub user: Option<String>,
    /// A further group; may be repeated.
    #[arg(short = 'g', long, value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// A further capability, such as CAP_KILL; may be repeated.
    #[arg(short, long, value_name = "NAME")]
    pub cap: Vec<String>,
    /// The process can gain no privileges.
    #[arg(long)]
    pub no_new_privs: bool,
    /// Return once the program runs.
    #[arg(short, long)]
    pub detach: bool,
    /// File that gets the number of the process that stands for the new one.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// In a paused container, wait until it is resumed instead of failing.
    #[arg(long)]
    pub ignore_paused: bool,
    /// How many descriptors to pass beyond the standard streams.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// A cgroup below the container's; not supported.
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<String>,
    /// Taken and ignored: profiles of the host do not reach into the guest.
    #[arg(long, value_name = "PROFILE")]
    pub apparmor: Option<String>,
    /// Taken and ignored: labels of the host do not reach into the guest.
    #[arg(long, value_name = "LABEL")]
    pub process_label: Option<String>,
}

/// Options of `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
    /// Options of ps(1); not supported.
    #[arg(value_name = "OPTIONS", trailing_var_arg = true, allow_hyphen_values = true)]
    pub options: Vec<String>,
    /// What the list looks like.
    #[arg(short, long, value_enum, default_value_t = PsFormat::Table)]
    pub format: PsFormat,
}

/// The forms of a list of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PsFormat {
    /// What runs in the machine, in columns, as the machine numbers it.
    Table,
    /// The numbers of the host's processes that stand for it, as an array.
    Json,
}

/// Options of `create`, and most of `run`.
#[derive(Debug, Args)]
pub struct Create {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
    /// Directory with config.json; the current one without it.
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// File that gets the number of the process that stands for the container.
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Socket for the terminal's master, if this process does not stay.
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// How many descriptors to pass beyond the standard streams.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// Taken and ignored: the guest decides how it changes the root.
    #[arg(long)]
    pub no_pivot: bool,
    /// Taken and ignored: keyrings of the host do not reach into the guest.
    #[arg(long)]
    pub no_new_keyring: bool,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Those of `create`.
    #[command(flatten)]
    pub create: Create,
    /// Return once the program runs.
    #[arg(short, long)]
    pub detach: bool,
    /// Keep the container's state after its end.
    #[arg(long)]
    pub keep: bool,
    /// Taken and ignored: this process has no children of the container.
    #[arg(long)]
    pub no_subreaper: bool,
}

/// Options of `kill`.
#[derive(Debug, Args)]
pub struct Kill {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
    /// A name or a number.
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
    /// To every process of the container.
    #[arg(short, long)]
    pub all: bool,
}

/// Options of `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// The container's name.
    #[arg(value_name = "CONTAINER")]
    pub id: ContainerId,
    /// Kill the container first; do not fail if it does not exist.
    #[arg(short, long)]
    pub force: bool,
}

/// Options of `list`.
#[derive(Debug, Args)]
pub struct List {
    /// What the list looks like.
    #[arg(short, long, value_enum, default_value_t = ListFormat::Table)]
    pub format: ListFormat,
    /// Names only.
    #[arg(short, long)]
    pub quiet: bool,
}

/// The forms of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ListFormat {
    /// Columns.
    Table,
    /// An array of states.
    Json,
}

/// Options of `spec`.
#[derive(Debug, Args)]
pub struct Spec {
    /// Directory for config.json; the current one without it.
    #[arg(short, long, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// A configuration for rootless containers; not supported.
    #[arg(long)]
    pub rootless: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::OCI_VERSION;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
        assert!(VERSION.ends_with(OCI_VERSION));
    }

    #[test]
    fn help_and_version_are_laid_out_as_by_runc() {
        let mut command = command();
        let help = command.render_help().to_string();
        assert!(help.starts_with("NAME:\n   bulkhead - Runs OCI containers"), "{help}");
        let kill = command.find_subcommand_mut("kill").unwrap().render_help().to_string();
        assert!(kill.starts_with("NAME:\n   bulkhead kill - Send a signal"), "{kill}");
        let version = command.render_version();
        assert!(
            version.starts_with("bulkhead version ") && version.contains("\nspec: "),
            "{version}"
        );
    }

    #[test]
    fn lines_that_callers_of_runc_write_are_understood() {
        for line in [
            "--root /r --log /l --log-format json create --bundle /b --pid-file /p a",
            "--root /r --systemd-cgroup create --bundle /b --no-pivot --no-new-keyring a",
            "--debug --rootless auto run -b /b -d --keep --preserve-fds 0 a",
            "run --no-subreaper a",
            "kill --all a KILL",
            "kill a 9",
            "delete --force a",
            "delete -f a",
            "list -q",
            "list -f json",
            "list --format=table",
            "spec -b /b",
            "exec a true",
            "exec --process /p --detach --pid-file /f a",
            "exec -e A=1 --env B=2 -u 1:2 --cwd /x a sh -c x",
            "ps --format json a",
            "ps a",
            "pause a",
            "resume a",
            "checkpoint a",
        ] {
            let words = std::iter::once("bulkhead").chain(line.split(' '));
            CommandLine::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn a_bad_name_is_refused_where_it_is_written() {
        let error = CommandLine::try_parse_from(["bulkhead", "state", "a/b"]).unwrap_err();
        assert!(error.to_string().contains("invalid container id \"a/b\""), "{error}");
    }
}
