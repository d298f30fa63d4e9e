// Package vmfs is the volume: a filesystem on a LUN that many hosts mount at once,
// with no coordinator. It owns the layout, the locks of objects, who owns each
// slab of 1 MiB, names, folders and files. The inside of a disk is the disk
// engine's; vmfs gives it a lock, a header and slabs.
//
// docs/format/volume.md describes the bytes. Everything shared changes by
// compare-and-write of one unit (block/unit): registers (package lease), lock
// units, identity units, owner-table units, the volume unit. There is no journal:
// each operation orders its writes so that a crash between any two leaves it done or
// not done, and at worst a DYING object or a stale entry, which a later change of the
// folder, or the search for a free object slot, clears away.
//
// A cancelled context ends waiting for locks and for content, never a command that
// is under way, nor a change of names or owners half way. A write that the device
// has answered, if only with an error, is taken to have ended; a compare-and-write is
// not (R1).
//
// Invariants:
//
//   - A slab's tag names at most one object, and changes only under that object's
//     exclusive lock, for which the intent is durable (R2).
//
//   - The identity unit is the truth of an object's name; an entry that disagrees
//     with it is stale (R4).
//
//   - An object slot turns FREE only after the last tag that names it is cleared.
//
//   - A lock whose holder's generation is dead is free (lease.Session.Dead).
//
//   - An object is DYING, and shown by nothing, from before it owns its first slab
//     until its content is on media.
//
// Lock order, on media: an object that is being created or published from, the
// volume lock, folders in slot order. Whoever holds a folder polls for another
// object's lock and breaks its holder if that is dead, but does not wait for a living
// one; identity units change by compare-and-write under whatever lock their rule asks
// for. In memory: the semaphore of a slot (Volume.locals) before its lock, the
// semaphore of an origin (Volume.origins) last; Volume.mu and Object.mu guard fields
// only and are never held across I/O.
package vmfs
