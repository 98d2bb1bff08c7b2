//! What the disk does: prewritten file, direct I/O, one write at a time.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    error::Error,
    fs::{File, OpenOptions, remove_file},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::Instant,
};

use hdrhistogram::Histogram;
use io_uring::{IoUring, opcode, squeue, types};

use crate::summary;

const BLOCK: usize = 4096;
const O_DIRECT: i32 = 0o40000;
const RWF_DSYNC: i32 = 2;
/// Bytes written before measuring, and over and over while measuring.
const FILE_BYTES: usize = 16 << 20;

struct Aligned {
    start: *mut u8,
    layout: Layout,
}

impl Aligned {
    fn new(len: usize) -> Result<Self, Box<dyn Error>> {
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

/// Measures and prints.
pub fn run(dir: &Path, size: usize, count: usize) -> Result<(), Box<dyn Error>> {
    let len = size.div_ceil(BLOCK) * BLOCK;
    let path = dir.join(".millrace-bench-floor");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(O_DIRECT)
        .open(&path)?;
    let measured = measure(&file, len, count);
    remove_file(&path)?;
    measured
}

fn measure(file: &File, len: usize, count: usize) -> Result<(), Box<dyn Error>> {
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
        let mut timed = |histogram: &mut Histogram<u64>, entries: &[squeue::Entry]| -> Result<(), Box<dyn Error>> {
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
    println!("{}", summary("direct write", &written));
    println!("{}", summary("direct write, linked fdatasync", &linked));
    println!("{}", summary("direct write, RWF_DSYNC", &dsync));
    Ok(())
}

/// Submits and waits for all.
fn submit(ring: &mut IoUring, entries: &[squeue::Entry]) -> io::Result<()> {
    for entry in entries {
        // SAFETY: file and buffer outlive the operation: every one is waited for below, before this returns.
        unsafe { ring.submission().push(entry) }.map_err(|e| io::Error::other(e.to_string()))?;
    }
    ring.submit_and_wait(entries.len())?;
    for done in ring.completion() {
        if done.result() < 0 {
            return Err(io::Error::from_raw_os_error(-done.result()));
        }
    }
    Ok(())
}
