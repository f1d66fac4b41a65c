//! A log that ends: when a part of it is full, only errors are written any more, so that the reason of an
//! end is in it whatever a guest did before; when all of it is, nothing.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::writer::{BoxMakeWriter, MakeWriter};

use super::{Form, line};

/// The most that a process logs, in bytes, and the part of it that is not for errors.
const MAX: u64 = 1 << 20;
const OTHERS_MAX: u64 = MAX / 2;

/// Where a process logs to, and how much it has written.
pub(super) struct Bounded {
    to: BoxMakeWriter,
    form: Form,
    written: AtomicU64,
}

impl Bounded {
    pub(super) fn new(to: BoxMakeWriter, form: Form) -> Self {
        Self { to, form, written: AtomicU64::new(0) }
    }

    fn up_to<'a>(&'a self, max: u64, to: Box<dyn Write + 'a>) -> Box<dyn Write + 'a> {
        Box::new(UpTo { log: self, max, to })
    }
}

impl<'a> MakeWriter<'a> for Bounded {
    type Writer = Box<dyn Write + 'a>;

    fn make_writer(&'a self) -> Self::Writer {
        self.up_to(OTHERS_MAX, self.to.make_writer())
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        let max = if *event.level() == Level::ERROR { MAX } else { OTHERS_MAX };
        self.up_to(max, self.to.make_writer_for(event))
    }
}

/// Writes lines while there is room for their kind, and once that there is none any more.
struct UpTo<'a> {
    log: &'a Bounded,
    max: u64,
    to: Box<dyn Write + 'a>,
}

impl Write for UpTo<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = bytes.len() as u64;
        let room = |written: u64| (written < self.max).then(|| written.saturating_add(len));
        let written = self.log.written.fetch_update(Ordering::Relaxed, Ordering::Relaxed, room);
        let Ok(before) = written else { return Ok(bytes.len()) };
        self.to.write_all(bytes)?;
        for (full, words) in [
            (OTHERS_MAX, "this log is half full: from now on only errors are logged"),
            (MAX, "this log is full: nothing more is logged"),
        ] {
            if (before..before + len).contains(&(full - 1)) {
                let last = line(self.log.form, Level::WARN, words, Duration::ZERO);
                writeln!(self.to, "{last}")?;
            }
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
    use std::sync::{Arc, Mutex};

    #[test]
    fn what_a_guest_causes_for_a_year_does_not_fill_the_disk() {
        let file = Arc::new(Mutex::new(Vec::new()));
        let to = BoxMakeWriter::new({
            let file = Arc::clone(&file);
            move || To(Arc::clone(&file))
        });
        let log = Bounded::new(to, Form::Text);
        let subscriber = tracing_subscriber::fmt().with_writer(log).with_ansi(false).finish();
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..100_000 {
                tracing::warn!("the guest wants something");
            }
            let by_the_guest = file.lock().unwrap().len() as u64;
            assert!((OTHERS_MAX..OTHERS_MAX + 1000).contains(&by_the_guest), "{by_the_guest}");
            tracing::error!("the reason");
            for _ in 0..100_000 {
                tracing::error!("an error");
            }
        });
        let text = String::from_utf8(file.lock().unwrap().clone()).unwrap();
        assert!(text.len() as u64 <= MAX + 1000, "{}", text.len());
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
