// Package vmfs is the volume: a filesystem on a LUN that many hosts mount at once,
// with no coordinator. It owns the layout, the locks of objects, who owns each
// slab of 1 MiB, names, folders and files. The inside of a disk is the disk
// engine's; vmfs gives it a lock, a header and slabs.
//
// docs/format/volume.md describes the bytes. Everything shared changes by
// compare-and-write of one unit (block/unit): registers (package lease), lock
// units, identity units, owner-table units, the volume unit. There is no journal:
// each operation orders its writes so that a crash between any two leaves at worst
// space that nobody uses or an object that no folder shows.
//
// Invariants:
//
//   - A slab's tag names at most one object, and changes only under that object's
//     exclusive lock, for which the intent is durable (R2).
//   - The identity unit is the truth of an object's name; an entry that disagrees
//     with it is stale (R4).
//   - An object slot turns FREE only after the last tag that names it is cleared.
//   - A lock whose holder's generation is dead is free (lease.Session.Dead).
//
// Lock order, on media: the volume lock, then folders in slot order, then one
// other object; identity units change by compare-and-write under whatever lock
// their rule asks for. In memory: Volume.mu and Object.mu guard fields only and
// are never held across I/O.
package vmfs
