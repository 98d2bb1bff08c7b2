//! What disk and network do without a broker, by io_uring: a prewritten file with direct I/O, one write at a time; the same
//! beside a reader of another file, for what readers of a backlog cost producers at the disk alone; an echo over loopback, one
//! message at a time.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    fs::{File, OpenOptions, remove_file},
    io,
    net::{TcpListener, TcpStream},
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::Outcome;

use hdrhistogram::Histogram;
use io_uring::{IoUring, opcode, squeue, types};

const BLOCK: usize = 4096;
pub const O_DIRECT: i32 = 0o40000;
const RWF_DSYNC: i32 = 2;
/// Bytes written before measuring, and over and over while measuring.
const FILE_BYTES: usize = 16 << 20;
/// Bytes that are read around and around: more than a disk's own cache.
const READ_FILE_BYTES: u64 = 1 << 30;
/// What readers do: for people, bytes of one read, reads in flight.
const READS: [(&str, usize, usize); 2] = [
    ("1 MiB, 4 in flight", 1 << 20, 4),
    ("128 KiB, 1 in flight", 128 << 10, 1),
];
/// How long a reader reads alone, and at most beside writes.
const READ_TIME: Duration = Duration::from_secs(4);

struct Aligned {
    start: *mut u8,
    layout: Layout,
}

impl Aligned {
    fn new(len: usize) -> Outcome<Self> {
        let layout = Layout::from_size_align(len, BLOCK)?;
        // SAFETY: the layout has a size above zero; a null pointer is refused below.
        let start = unsafe { alloc_zeroed(layout) };
        if start.is_null() {
            return Err("out of memory".into());
        }
        Ok(Self { start, layout })
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and not freed before.
        unsafe { dealloc(self.start, self.layout) }
    }
}

/// Latencies in nanoseconds, and the rates of a sequential reader in bytes a second.
pub struct Floor {
    parts: Vec<(String, Histogram<u64>)>,
    reads: Vec<(String, f64)>,
}

impl Floor {
    /// A line for each operation.
    pub fn lines(&self) -> Vec<String> {
        let us = |h: &Histogram<u64>, q: f64| h.value_at_quantile(q) as f64 / 1000.0;
        let latencies = self.parts.iter().map(|(name, h)| {
            format!(
                "{name}: n {} p50 {:.0} p99 {:.0} p99.9 {:.0} max {:.0} us",
                h.len(),
                us(h, 0.5),
                us(h, 0.99),
                us(h, 0.999),
                h.max() as f64 / 1000.0
            )
        });
        let rates = self
            .reads
            .iter()
            .map(|(name, rate)| format!("{name}: {:.0} MB/s", rate / 1e6));
        latencies.chain(rates).collect()
    }
}

/// Measures.
pub fn run(dir: &Path, size: usize, count: usize) -> Outcome<Floor> {
    let len = size.div_ceil(BLOCK) * BLOCK;
    let written = Scratch::new(dir, ".millrace-bench-floor")?;
    let mut parts: Vec<_> = (measure(&written.0, len, count)?.into_iter())
        .map(|(name, h)| (name.to_owned(), h))
        .collect();
    let read = Scratch::new(dir, ".millrace-bench-floor-read")?;
    prewrite(&read.0)?;
    let mut reads = Vec::new();
    for (name, bytes, in_flight) in READS {
        let mut reader = Reader::new(&read.0, bytes, in_flight)?;
        let alone = reader.read(|began| began.elapsed() >= READ_TIME)?;
        let done = AtomicBool::new(false);
        let (beside, latencies) = thread::scope(|scope| -> Outcome<_> {
            let reading = scope.spawn(|| reader.read(|_| done.load(Ordering::Acquire)).map_err(|e| e.to_string()));
            let measured = durable_writes(&written.0, len, count);
            done.store(true, Ordering::Release);
            let rate = reading.join().map_err(|_| "the reader's thread panicked")??;
            Ok((rate, measured?))
        })?;
        parts.push((format!("direct write, RWF_DSYNC, beside reads of {name}"), latencies));
        reads.push((format!("direct reads of {name}"), alone));
        reads.push((format!("direct reads of {name}, beside those writes"), beside));
    }
    parts.push(("echo over loopback".to_owned(), echo(size, count)?));
    Ok(Floor { parts, reads })
}

/// Writes the file that is read.
fn prewrite(file: &File) -> Outcome<()> {
    let buffer = Aligned::new(FILE_BYTES)?;
    let mut ring = IoUring::new(1)?;
    let fd = types::Fd(file.as_raw_fd());
    for at in (0..READ_FILE_BYTES).step_by(FILE_BYTES) {
        let entry = opcode::Write::new(fd, buffer.start, FILE_BYTES as u32).offset(at);
        submit(&mut ring, &[entry.build()])?;
    }
    Ok(file.sync_all()?)
}

/// A file for direct I/O that is removed in the end.
struct Scratch(File, PathBuf);

impl Scratch {
    fn new(dir: &Path, name: &str) -> Outcome<Self> {
        let path = dir.join(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(O_DIRECT)
            .open(&path)
            .map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self(file, path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = remove_file(&self.1);
    }
}

/// Reads a file from front to back and around.
struct Reader<'a> {
    file: &'a File,
    ring: IoUring,
    buffers: Aligned,
    /// Of one read.
    bytes: usize,
    in_flight: usize,
    at: u64,
}

// SAFETY: the buffers belong to it alone; whoever has it may use them.
unsafe impl Send for Reader<'_> {}

impl<'a> Reader<'a> {
    fn new(file: &'a File, bytes: usize, in_flight: usize) -> Outcome<Self> {
        Ok(Self {
            file,
            ring: IoUring::new(in_flight as u32)?,
            buffers: Aligned::new(in_flight * bytes)?,
            bytes,
            in_flight,
            at: 0,
        })
    }

    /// Reads until `done` says so of the time it began; bytes a second.
    fn read(&mut self, done: impl Fn(Instant) -> bool) -> Outcome<f64> {
        let fd = types::Fd(self.file.as_raw_fd());
        let began = Instant::now();
        let (mut read, mut in_flight, mut failed) = (0, 0, None);
        let mut idle: Vec<usize> = (0..self.in_flight).collect();
        loop {
            if failed.is_none() && !done(began) {
                for buffer in idle.drain(..) {
                    // SAFETY: within the allocation, which has so many pieces of `bytes`.
                    let start = unsafe { self.buffers.start.add(buffer * self.bytes) };
                    let entry = opcode::Read::new(fd, start, self.bytes as u32).offset(self.at);
                    // SAFETY: nothing else uses this piece, and all reads are waited for before this returns.
                    unsafe { self.ring.submission().push(&entry.build().user_data(buffer as u64)) }?;
                    self.at = (self.at + self.bytes as u64) % READ_FILE_BYTES;
                    in_flight += 1;
                }
            }
            if in_flight == 0 {
                break;
            }
            self.ring.submit_and_wait(1)?;
            for entry in self.ring.completion() {
                in_flight -= 1;
                idle.push(entry.user_data() as usize);
                match usize::try_from(entry.result()) {
                    Ok(bytes) if bytes == self.bytes => read += bytes,
                    _ => failed = Some(format!("a read gave {}", entry.result())),
                }
            }
        }
        match failed {
            Some(failed) => Err(failed.into()),
            None => Ok(read as f64 / began.elapsed().as_secs_f64()),
        }
    }
}

/// One side sends, the other sends back.
fn echo(size: usize, count: usize) -> Outcome<Histogram<u64>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = Side::new(TcpStream::connect(listener.local_addr()?)?, size)?;
    let (stream, _) = listener.accept()?;
    let server = thread::spawn(move || -> io::Result<()> {
        let mut side = Side::new(stream, size)?;
        for _ in 0..count {
            side.receive()?;
            side.send()?;
        }
        Ok(())
    });
    let mut histogram = Histogram::<u64>::new(3)?;
    for _ in 0..count {
        let began = Instant::now();
        client.send()?;
        client.receive()?;
        histogram.record(began.elapsed().as_nanos() as u64)?;
    }
    server.join().map_err(|_| "the echo's thread panicked")??;
    Ok(histogram)
}

struct Side {
    stream: TcpStream,
    ring: IoUring,
    buffer: Vec<u8>,
}

impl Side {
    fn new(stream: TcpStream, size: usize) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            ring: IoUring::new(4)?,
            buffer: vec![0; size],
        })
    }

    fn send(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.stream.as_raw_fd());
        let mut done = 0;
        while done < self.buffer.len() {
            let rest = &self.buffer[done..];
            let entry = opcode::Send::new(fd, rest.as_ptr(), rest.len() as u32).build();
            done += submit(&mut self.ring, &[entry])?;
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.stream.as_raw_fd());
        let mut done = 0;
        while done < self.buffer.len() {
            let rest = &mut self.buffer[done..];
            let entry = opcode::Recv::new(fd, rest.as_mut_ptr(), rest.len() as u32).build();
            match submit(&mut self.ring, &[entry])? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read,
            }
        }
        Ok(())
    }
}

fn measure(file: &File, len: usize, count: usize) -> Outcome<Vec<(&'static str, Histogram<u64>)>> {
    let buffer = Aligned::new(FILE_BYTES)?;
    let mut ring = IoUring::new(8)?;
    let fd = types::Fd(file.as_raw_fd());
    let write = |len: usize, at: u64| opcode::Write::new(fd, buffer.start, len as u32).offset(at);
    let flush = || opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
    submit(&mut ring, &[write(FILE_BYTES, 0).build()])?;
    submit(&mut ring, &[flush()])?;
    let mut written = Histogram::<u64>::new(3)?;
    let mut linked = Histogram::<u64>::new(3)?;
    let mut dsync = Histogram::<u64>::new(3)?;
    // The three take turns, so that a noisy neighbour meets all of them.
    for n in 0..count {
        let at = (n * len % (FILE_BYTES - len) / BLOCK * BLOCK) as u64;
        let mut timed = |histogram: &mut Histogram<u64>, entries: &[squeue::Entry]| -> Outcome<()> {
            let began = Instant::now();
            submit(&mut ring, entries)?;
            histogram.record(began.elapsed().as_nanos() as u64)?;
            Ok(())
        };
        timed(&mut written, &[write(len, at).build()])?;
        timed(
            &mut linked,
            &[write(len, at).build().flags(squeue::Flags::IO_LINK), flush()],
        )?;
        timed(&mut dsync, &[write(len, at).rw_flags(RWF_DSYNC).build()])?;
    }
    Ok(vec![
        ("direct write", written),
        ("direct write, linked fdatasync", linked),
        ("direct write, RWF_DSYNC", dsync),
    ])
}

/// One durable write after the other, `count` or what fits into [`READ_TIME`].
fn durable_writes(file: &File, len: usize, count: usize) -> Outcome<Histogram<u64>> {
    let mut file = Prewritten::new(file.try_clone()?)?;
    let record = vec![0; len];
    let mut histogram = Histogram::<u64>::new(3)?;
    let all = Instant::now();
    while histogram.len() < count as u64 && all.elapsed() < READ_TIME {
        let began = Instant::now();
        file.append(&record, true)?;
        histogram.record(began.elapsed().as_nanos() as u64)?;
    }
    Ok(histogram)
}

/// A file whose blocks were all written once, written again from front to back and around.
pub struct Prewritten {
    file: File,
    ring: IoUring,
    buffer: Aligned,
    at: usize,
}

impl Prewritten {
    /// Prewrites a file that was opened for direct I/O.
    ///
    /// # Errors
    /// The system's.
    pub fn new(file: File) -> Outcome<Self> {
        let mut this = Self {
            file,
            ring: IoUring::new(4)?,
            buffer: Aligned::new(FILE_BYTES)?,
            at: 0,
        };
        this.write(FILE_BYTES, true)?;
        this.at = 0;
        Ok(this)
    }

    /// Writes `bytes` in whole blocks and waits until they are written, and durable if it `flushes`.
    ///
    /// # Errors
    /// The system's, or more bytes than the file has.
    pub fn append(&mut self, bytes: &[u8], flushes: bool) -> Outcome<()> {
        let len = bytes.len().div_ceil(BLOCK) * BLOCK;
        if len > FILE_BYTES {
            return Err(format!("{} bytes at once", bytes.len()).into());
        }
        if self.at + len > FILE_BYTES {
            self.at = 0;
        }
        // SAFETY: the allocation has FILE_BYTES bytes, checked above, and no operation uses them now.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.buffer.start, bytes.len()) };
        self.write(len, flushes)
    }

    fn write(&mut self, len: usize, flushes: bool) -> Outcome<()> {
        let entry = opcode::Write::new(types::Fd(self.file.as_raw_fd()), self.buffer.start, len as u32)
            .offset(self.at as u64)
            .rw_flags(if flushes { RWF_DSYNC } else { 0 })
            .build();
        if submit(&mut self.ring, &[entry])? != len {
            return Err("a short write".into());
        }
        self.at += len;
        Ok(())
    }
}

/// Submits and waits for all; returns the bytes that they moved.
fn submit(ring: &mut IoUring, entries: &[squeue::Entry]) -> io::Result<usize> {
    for entry in entries {
        // SAFETY: descriptor and buffer outlive the operation: every one is waited for below, before this returns.
        unsafe { ring.submission().push(entry) }.map_err(|e| io::Error::other(e.to_string()))?;
    }
    ring.submit_and_wait(entries.len())?;
    let mut moved = 0;
    for done in ring.completion() {
        match usize::try_from(done.result()) {
            Ok(bytes) => moved += bytes,
            Err(_) => return Err(io::Error::from_raw_os_error(-done.result())),
        }
    }
    Ok(moved)
}
