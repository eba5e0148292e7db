//! Progress of something countable: a bar on a terminal, plain lines at a fixed cadence elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::printer::Printer;

/// Time until the first plain line.
const SILENCE: Duration = Duration::from_secs(2);

/// Time between plain lines; the last count is always printed.
const CADENCE: Duration = Duration::from_secs(10);

/// A running count.
#[derive(Debug)]
pub struct Progress {
    printer: Printer,
    what: String,
    total: u64,
    done: u64,
    begin: u64,
    started: Instant,
    printed: Option<Instant>,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Starts to count `what` from `done` (0, or where a resumed run stands) to `total`.
    pub fn start(printer: &Printer, what: &str, done: u64, total: u64) -> Progress {
        let bar = printer.bars().map(|bars| {
            let bar = bars.add(ProgressBar::new(total).with_position(done).with_prefix(what.to_owned()));
            let style = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len}  {wide_msg} eta {eta}")
                .expect("the template is well formed");
            bar.set_style(style);
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        let now = Instant::now();
        Progress {
            printer: printer.clone(),
            what: what.to_owned(),
            total,
            done,
            begin: done,
            started: now,
            printed: None,
            bar,
        }
    }

    /// Moves the count to `done`; `message` says how it goes (`loss 1.234  250 tok/s`).
    pub fn update(&mut self, done: u64, message: &str) {
        self.done = done;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message.to_owned());
            return;
        }
        let due = match self.printed {
            Some(printed) => printed.elapsed() >= CADENCE,
            None => self.started.elapsed() >= SILENCE,
        };
        if due || done >= self.total {
            self.printed = Some(Instant::now());
            let line = plain_line(&self.what, self.begin, done, self.total, self.started.elapsed(), message);
            self.printer.note(&line);
        }
    }

    /// Moves the count to `done`, with nothing to say.
    pub fn advance(&mut self, done: u64) {
        self.done = done;
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    /// Where the count stands.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Takes this moment for the start: what came before says nothing of the time that is left.
    pub fn restart(&mut self) {
        (self.begin, self.started) = (self.done, Instant::now());
        if let Some(bar) = &self.bar {
            bar.reset_eta();
        }
    }

    /// Ends the count and removes the bar.
    pub fn finish(self) {
        drop(self);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `step 12/60  loss 1.234  eta 1m05s`; the end of the count needs no eta.
fn plain_line(what: &str, begin: u64, done: u64, total: u64, elapsed: Duration, message: &str) -> String {
    let mut parts = vec![format!("{what} {done}/{total}")];
    if !message.is_empty() {
        parts.push(message.to_owned());
    }
    let (made, left) = (done.saturating_sub(begin), total.saturating_sub(done));
    if made > 0 && left > 0 {
        let seconds = elapsed.as_secs_f64() * left as f64 / made as f64;
        parts.push(format!("eta {}", duration(seconds.ceil() as u64)));
    }
    parts.join("  ")
}

/// `7s`, `1m05s`, `2h03m`.
pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h{:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_line_has_count_message_and_the_time_that_is_left() {
        let at = |begin, done| plain_line("step", begin, done, 60, Duration::from_secs(13), "loss 1.2");
        assert_eq!(at(0, 10), "step 10/60  loss 1.2  eta 1m05s");
        assert_eq!(at(50, 55), "step 55/60  loss 1.2  eta 13s");
        assert_eq!(at(0, 60), "step 60/60  loss 1.2");
        assert_eq!(at(10, 10), "step 10/60  loss 1.2");
    }

    #[test]
    fn durations_have_two_units() {
        assert_eq!([7, 65, 7380].map(duration), ["7s", "1m05s", "2h03m"]);
    }
}
