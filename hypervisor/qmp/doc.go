// Package qmp speaks QEMU's machine protocol, QMP: JSON messages over a stream
// socket (docs/interop/qmp-spec.txt of QEMU). It knows the protocol and a few
// typed commands; it starts no QEMU and keeps no picture of one.
//
// Invariants: commands may be in flight together and are matched to replies by
// id, in whatever order those come; a slow reader of events never delays a
// reply; once the connection is lost or speaks nonsense, every waiting and later
// command fails with ErrClosed.
//
// A command whose context ended may still be carried out.
//
// Lock order: none; the send lock and mu are never held together.
package qmp
