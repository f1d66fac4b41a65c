//! A log of bounded size, like those of the jailed processes.

use std::io::{self, Write};
use std::time::Duration;

use bulkhead_vmm::log_allowance::Allowance;
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::writer::{BoxMakeWriter, MakeWriter};

use super::{Form, line};

/// Where a process logs to, and how much it may write.
pub(super) struct Bounded {
    to: BoxMakeWriter,
    form: Form,
    allowance: Allowance,
}

impl Bounded {
    pub(super) fn new(to: BoxMakeWriter, form: Form, bytes_max: u64) -> Self {
        Self { to, form, allowance: Allowance::new(bytes_max) }
    }

    fn lines<'a>(&'a self, error: bool, to: Box<dyn Write + 'a>) -> Box<dyn Write + 'a> {
        Box::new(Lines { log: self, error, to })
    }
}

impl<'a> MakeWriter<'a> for Bounded {
    type Writer = Box<dyn Write + 'a>;

    fn make_writer(&'a self) -> Self::Writer {
        self.lines(false, self.to.make_writer())
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        self.lines(*event.level() == Level::ERROR, self.to.make_writer_for(event))
    }
}

/// Writes lines of one kind, each with one call, as long as there is room for them.
struct Lines<'a> {
    log: &'a Bounded,
    error: bool,
    to: Box<dyn Write + 'a>,
}

impl Write for Lines<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(notices) = self.log.allowance.take(self.error, bytes.len() as u64) else {
            return Ok(bytes.len());
        };
        self.to.write_all(bytes)?;
        for words in notices {
            let last = line(self.log.form, Level::WARN, words, Duration::ZERO);
            writeln!(self.to, "{last}")?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_vmm::log_allowance::BYTES_MAX;
    use std::sync::{Arc, Mutex};

    #[test]
    fn what_a_guest_causes_for_a_year_does_not_fill_the_disk() {
        let file = Arc::new(Mutex::new(Vec::new()));
        let to = BoxMakeWriter::new({
            let file = Arc::clone(&file);
            move || To(Arc::clone(&file))
        });
        let log = Bounded::new(to, Form::Text, BYTES_MAX);
        let subscriber = tracing_subscriber::fmt().with_writer(log).with_ansi(false).finish();
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..100_000 {
                tracing::warn!("the guest wants something");
            }
            let by_the_guest = file.lock().unwrap().len() as u64;
            assert!(
                (BYTES_MAX / 2..BYTES_MAX / 2 + 1000).contains(&by_the_guest),
                "{by_the_guest}"
            );
            tracing::error!("the reason");
            for _ in 0..100_000 {
                tracing::error!("an error");
            }
        });
        let text = String::from_utf8(file.lock().unwrap().clone()).unwrap();
        assert!(text.len() as u64 <= BYTES_MAX + 1000, "{}", text.len());
        assert_eq!(text.matches("half full").count(), 1);
        assert!(text.contains("the reason"));
        assert!(text.trim_end().lines().last().unwrap().contains("nothing more is logged"));
    }

    struct To(Arc<Mutex<Vec<u8>>>);

    impl Write for To {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}
