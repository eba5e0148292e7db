//! Pieces made by many threads and taken in order by one, with a bounded number on the way.
//!
//! A worker may run ahead of the taker by `window` pieces and then waits, so that memory does not depend
//! on the number of pieces. Buffers go around: the taker gives back what the workers fill.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Result;

/// What workers and taker share.
#[derive(Debug, Default)]
struct State {
    /// The next piece that nobody makes yet, and the next that is taken.
    next: usize,
    taken: usize,
    made: BTreeMap<usize, Result<Vec<u8>>>,
    free: Vec<Vec<u8>>,
    /// An error was taken or a worker panicked: nobody starts a piece any more.
    stopped: bool,
}

struct Shared {
    state: Mutex<State>,
    /// There is room to run ahead, or the end.
    room: Condvar,
    /// A piece was made, or the end.
    piece: Condvar,
}

impl Shared {
    /// A worker's panic is passed on when the threads are joined, not here.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.lock().stopped = true;
        self.room.notify_all();
        self.piece.notify_all();
    }
}

/// Stops everyone when its thread panics.
struct StopOnPanic<'a>(&'a Shared);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop();
        }
    }
}

/// Makes pieces `0..count` on `workers` threads, each with its own scratch from `scratch`, and hands them to
/// `take` in order on the calling thread. `make` gets an empty buffer to fill.
///
/// # Errors
/// That of the first piece, in order, that could not be made, or that of `take`.
pub fn in_order<S>(
    count: usize,
    workers: usize,
    window: usize,
    scratch: impl Fn() -> S + Sync,
    make: impl Fn(&mut S, usize, &mut Vec<u8>) -> Result<()> + Sync,
    mut take: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let shared = Shared { state: Mutex::default(), room: Condvar::new(), piece: Condvar::new() };
    let window = window.max(1);
    let work = || {
        let _guard = StopOnPanic(&shared);
        let mut scratch = scratch();
        loop {
            let mut state = shared.lock();
            while !state.stopped && state.next < count && state.next >= state.taken + window {
                state = shared.room.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stopped || state.next >= count {
                return;
            }
            let piece = state.next;
            state.next += 1;
            let mut buffer = state.free.pop().unwrap_or_default();
            drop(state);
            buffer.clear();
            let made = make(&mut scratch, piece, &mut buffer).map(|()| buffer);
            shared.lock().made.insert(piece, made);
            shared.piece.notify_one();
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..workers.clamp(1, count.max(1)) {
            scope.spawn(work);
        }
        let _guard = StopOnPanic(&shared);
        for piece in 0..count {
            let mut state = shared.lock();
            let made = loop {
                if let Some(made) = state.made.remove(&piece) {
                    break made;
                }
                if state.stopped {
                    return Ok(());
                }
                state = shared.piece.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let taken = made.and_then(|buffer| take(piece, &buffer).map(|()| buffer));
            match taken {
                Ok(buffer) => {
                    let mut state = shared.lock();
                    state.free.push(buffer);
                    state.taken = piece + 1;
                    drop(state);
                    shared.room.notify_all();
                }
                Err(error) => {
                    shared.stop();
                    return Err(error);
                }
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::error::Error;

    #[test]
    fn pieces_come_in_order_and_few_are_on_the_way() {
        for (workers, window) in [(1, 1), (4, 1), (4, 3), (3, 100)] {
            let (started, taken) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let mut found = Vec::new();
            in_order(
                50,
                workers,
                window,
                || 0_u64,
                |_, piece, out| {
                    started.fetch_max(piece + 1, Ordering::SeqCst);
                    assert!(piece < taken.load(Ordering::SeqCst) + window + 1);
                    out.extend([piece as u8; 3]);
                    Ok(())
                },
                |piece, bytes| {
                    assert_eq!(bytes, [piece as u8; 3]);
                    found.push(piece);
                    taken.store(piece + 1, Ordering::SeqCst);
                    Ok(())
                },
            )
            .unwrap();
            assert_eq!(found, (0..50).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_error_of_the_first_piece_is_reported_and_later_pieces_are_not_taken() {
        let mut last = None;
        let error = in_order(
            100,
            4,
            8,
            || (),
            |(), piece, _| if piece % 10 == 7 { Err(Error::refused(format!("{piece}"))) } else { Ok(()) },
            |piece, _| {
                last = Some(piece);
                Ok(())
            },
        );
        assert_eq!((error.unwrap_err().to_string(), last), ("7".to_owned(), Some(6)));
        let error = in_order(9, 2, 2, || (), |(), _, _| Ok(()), |_, _| Err(Error::refused("full")));
        assert_eq!(error.unwrap_err().to_string(), "full");
        in_order(0, 2, 2, || (), |(), _, _| Ok(()), |_, _| Ok(())).unwrap();
    }

    #[test]
    #[should_panic(expected = "a scoped thread panicked")]
    fn a_panic_of_a_worker_ends_it_all() {
        let _ = in_order(9, 2, 1, || (), |(), piece, _| panic!("{piece}"), |_, _| Ok(()));
    }
}
