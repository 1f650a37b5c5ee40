// Command init is process 1 of a lab's Linux guest. It loads the drivers that
// came with it, sets its network up, serves what package workload has to offer,
// and is controlled as package control says. Everything it needs to know stands
// on the kernel command line.
package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lmctl/lmctl/guest/control"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this is process 1 of a lab guest, and nothing else")
		os.Exit(2)
	}
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "init: %v\n", err)
	}
	powerOff()
}

// run returns when the guest is told to power off, or could not be set up.
func run() error {
	started := time.Now()
	if err := mountAll(); err != nil {
		return err
	}
	console, err := openConsole()
	if err != nil {
		return err
	}
	defer console.Close()
	if err := loadModules(moduleDir); err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	settings, err := control.ParseCmdline(string(cmdline))
	if err != nil {
		return err
	}
	// Services stay responsive beside a writer that never rests: Go must not be
	// left with one thread for all of them.
	runtime.GOMAXPROCS(runtime.NumCPU() + 2)
	if err := configureNetwork(settings); err != nil {
		return err
	}
	g, err := newGuest(settings, started)
	if err != nil {
		return err
	}
	return g.serve(context.Background(), console)
}

// powerOff never returns: process 1 must not.
func powerOff() {
	unix.Sync()
	for {
		// It fails only for want of ACPI; then the guest halts with its last
		// words on the console.
		if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
			fmt.Fprintf(os.Stderr, "init: power off: %v\n", err)
			select {}
		}
	}
}
