//! Services inside a namespace that say who they are and whom they see.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::net::{Shutdown, shutdown};

use super::Space;

/// A service that answers `NAME sees ADDRESS:PORT`, until it is dropped.
pub struct Service {
    listener: Option<TcpListener>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// A UDP service looks this often whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

impl Space {
    /// Answers each connection and closes it.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn serve_tcp(&self, at: SocketAddr, name: &str) -> Result<Service> {
        let listener = self
            .enter(|| TcpListener::bind(at))?
            .with_context(|| at.to_string())?;
        let (name, mine) = (name.to_owned(), listener.try_clone()?);
        let thread = std::thread::spawn(move || {
            while let Ok((mut stream, peer)) = mine.accept() {
                let _ = write!(stream, "{name} sees {peer}"); // who does not listen hears nothing
            }
        });
        Ok(Service {
            listener: Some(listener),
            ends: Arc::default(),
            thread: Some(thread),
        })
    }

    /// Answers each datagram.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn serve_udp(&self, at: SocketAddr, name: &str) -> Result<Service> {
        let socket = self
            .enter(|| UdpSocket::bind(at))?
            .with_context(|| at.to_string())?;
        socket.set_read_timeout(Some(LOOK))?;
        let ends = Arc::new(AtomicBool::new(false));
        let (name, end) = (name.to_owned(), Arc::clone(&ends));
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 512];
            while !end.load(Ordering::Relaxed) {
                match socket.recv_from(&mut bytes) {
                    Ok((_, peer)) => drop(socket.send_to(format!("{name} sees {peer}").as_bytes(), peer)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => {} // an ICMP error about an earlier answer
                }
            }
        });
        Ok(Service {
            listener: None,
            ends,
            thread: Some(thread),
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(listener) = &self.listener {
            let _ = shutdown(listener, Shutdown::Read); // its accept fails
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it cannot panic
        }
    }
}
