package main

import (
	"fmt"
	"path/filepath"
)

// printHints says how to go on with what KEEP=1 left running.
func (d *demo) printHints() {
	at := d.basalt + " "
	host := " --run-dir " + d.runDir
	uri := func(export string) string {
		return fmt.Sprintf("'nbd+unix:///%s?socket=%s'", export, d.hostB.socket)
	}
	disk := exportName(diskPath)
	fmt.Fprintf(d.n.w, `
host-b (process %d) and the guest (process %d) are running. To try:

  the disk           %sdisk info %s:%s%s
  its snapshots      %sdisk snapshot ls %s:%s%s
  another one        %sdisk snapshot create %s:%s later%s
  what is served     nbdinfo --list %s
  what is mapped     nbdinfo --map --totals %s
  the hosts          %sfs hosts %s
  the guest's words  socat -u UNIX-CONNECT:%s -
                     (package socat; W is a record and its microseconds)
  host-b's words     cat %s

To end it all (the guest as by a power cut):

  kill -KILL %d; kill %d; rm -r %s
`,
		d.hostB.cmd.Process.Pid, d.machineB.vm.PID(),
		at, d.lun, diskPath, host,
		at, d.lun, diskPath, host,
		at, d.lun, diskPath, host,
		uri(""), uri(disk+"@"+snapName),
		at, d.lun,
		filepath.Join(d.machineB.runDir, "console.sock"),
		d.hostB.log,
		d.machineB.vm.PID(), d.hostB.cmd.Process.Pid, d.dir)
}
