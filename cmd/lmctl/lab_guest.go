package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lmctl/lmctl/internal/lab"
)

func newLabGuestCommand(l *labOptions) *cobra.Command {
	cmd := &cobra.Command{Use: "guest", Short: "Guests that prove that they are whole", Args: noSuchCommand, RunE: showHelp}
	cmd.AddCommand(newLabGuestStartCommand(l), newLabGuestCheckCommand(l), newLabGuestRemoveCommand(l))
	return cmd
}

// dirtyRate is a flag: a rate, or max.
type dirtyRate int64

func (d *dirtyRate) Set(s string) error {
	if s == "max" {
		*d = lab.Unbounded
		return nil
	}
	return (*rateValue)(d).Set(s)
}

func (d *dirtyRate) String() string {
	if *d == lab.Unbounded {
		return "max"
	}
	return (*rateValue)(d).String()
}

func (d *dirtyRate) Type() string { return "rate" }

func newLabGuestStartCommand(l *labOptions) *cobra.Command {
	spec := lab.GuestSpec{}
	var memory, set string
	cmd := &cobra.Command{
		Use: "start NAME", Short: "Start a guest and wait until it is at work", Args: takes("NAME"),
		Long: `Starts a guest of one of two kinds:

  linux   a small Linux with network services, a disk, a memory writer and a
          memory checker; emulated where this machine's KVM cannot run it
  flat    a boot sector that dirties memory, for real KVM everywhere`,
		RunE: func(cmd *cobra.Command, args []string) error {
			spec.Name = args[0]
			var err error
			if spec.Memory, err = parseSize(memory); err != nil {
				return &usageError{fmt.Errorf("--memory: %w", err)}
			}
			if set != "" {
				if spec.WorkingSet, err = parseSize(set); err != nil {
					return &usageError{fmt.Errorf("--working-set: %w", err)}
				}
			}
			open, err := lab.Open(l.dir)
			if err != nil {
				return err
			}
			ctx, stop := interruptible(cmd.Context())
			defer stop()
			g, err := open.StartGuest(ctx, spec, l.say)
			if err != nil {
				return err
			}
			if l.json {
				return printJSON(l.out, g)
			}
			at := ""
			if g.Kind == lab.Linux {
				at = " at " + g.Addresses()[0].Addr().String()
			}
			_, err = fmt.Fprintf(l.out, "guest %s is at work on %s%s\n", g.Name, g.Host, at)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar((*string)(&spec.Kind), "kind", string(lab.Linux), "linux or flat")
	f.StringVar(&spec.Host, "host", lab.HostName(1), "where it starts")
	f.StringVar(&memory, "memory", "512MiB", "how much memory it has")
	f.IntVar(&spec.VCPUs, "vcpus", 1, "how many CPUs it has")
	f.Var((*dirtyRate)(&spec.DirtyRate), "dirty-rate", "how much memory it writes a second, like 100MiB/s, or max")
	f.StringVar(&set, "working-set", "", "how much of its memory that is (default 64MiB)")
	f.StringVar(&spec.Pattern, "pattern", "sequential", "sequential, random, or rewrite (what is there already)")
	f.IntVar(&spec.DiskSetting.Rate, "disk-rate", 0, "records that it writes to its disk a second, each synced (linux)")
	f.IntVar(&spec.DiskSetting.Readers, "disk-readers", 0, "direct reads that it keeps in flight (linux)")
	f.StringVar(&spec.Disk, "disk", "", "raw image for its disk (linux; default: one is made)")
	f.StringVar(&spec.Machine, "machine", "", "QEMU machine type (default pc)")
	f.StringVar(&spec.Accelerator, "accelerator", "", "auto, kvm or tcg (default: auto; a flat guest: kvm)")
	f.StringVar((*string)(&spec.Shape.Backing), "memory-backing", "", "with libvirt: file (the default), memfd or private")
	f.BoolVar(&spec.Shape.Transient, "transient", false, "with libvirt: a domain without a definition")
	f.StringVar(&spec.QEMU, "qemu", "", "QEMU's binary")
	f.StringVar(&spec.FirmwareDir, "firmware-dir", "", "where an unpacked QEMU has its firmware")
	return cmd
}

func newLabGuestCheckCommand(l *labOptions) *cobra.Command {
	return &cobra.Command{
		Use: "check NAME", Short: "Have a guest check itself; exit code 0 when it is whole and goes on", Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			open, err := lab.Open(l.dir)
			if err != nil {
				return err
			}
			v, err := open.CheckGuest(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if l.json {
				if err := printJSON(l.out, v); err != nil || v.OK {
					return err
				}
				return &silentError{exitOther}
			}
			if !v.OK {
				return errors.New("guest " + v.Guest + " on " + v.Host + " is not well: " + strings.Join(v.Problems, "; "))
			}
			_, err = fmt.Fprintf(l.out, "guest %s on %s is whole and goes on (%d)\n", v.Guest, v.Host, v.Counter)
			return err
		},
	}
}

func newLabGuestRemoveCommand(l *labOptions) *cobra.Command {
	return &cobra.Command{
		Use: "remove NAME", Short: "End a guest, wherever it runs, and remove it", Args: takes("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			open, err := lab.Open(l.dir)
			if err != nil {
				return err
			}
			return open.RemoveGuest(cmd.Context(), args[0])
		},
	}
}
