package control

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Pattern is the order in which the memory writer goes through its working
// set, and what it writes.
type Pattern string

// The patterns.
const (
	Sequential Pattern = "sequential" // in the order of addresses, each time something new
	Random     Pattern = "random"     // pages picked at random, each time something new
	Rewrite    Pattern = "rewrite"    // in the order of addresses, what is there already
)

// Unbounded is the rate of a writer that writes as fast as it can.
const Unbounded = -1

// MemorySetting says what the memory writer does.
type MemorySetting struct {
	Rate       int64   `json:"rate"`        // bytes a second, whole pages at a time; 0 for none, or Unbounded
	WorkingSet int64   `json:"working_set"` // bytes that are written again and again
	Pattern    Pattern `json:"pattern"`
	CheckRate  int64   `json:"check_rate"` // bytes a second that are checked in the background
}

// DiskSetting says what the disk writer does.
type DiskSetting struct {
	Rate    int `json:"rate"`    // records a second, each synced; 0 for none, or Unbounded
	Readers int `json:"readers"` // how many direct reads are kept in flight
}

// Settings are all that a guest is told by its kernel command line.
type Settings struct {
	Addresses []netip.Prefix // of its network interface, IPv4 and IPv6
	Gateways  []netip.Addr
	Memory    MemorySetting
	Static    int64  // bytes written once at boot, and checked for ever
	Seed      uint64 // of what is written
	Device    string // raw block device for the disk writer, "" for none
	Disk      DiskSetting
	Tick      time.Duration // between two readings of the clock
	Report    time.Duration // between two lines of status on the console
}

// Defaults are the settings of a guest that was told nothing.
func Defaults() Settings {
	return Settings{
		Memory: MemorySetting{WorkingSet: 64 << 20, Pattern: Sequential, CheckRate: 4 << 20},
		Static: 16 << 20,
		Seed:   1,
		Tick:   10 * time.Millisecond,
		Report: 10 * time.Second,
	}
}

// Limits of what may be set.
const (
	MinTick = 100 * time.Microsecond
	MaxTick = 10 * time.Second
	maxSize = 1 << 44 // bytes, and bytes a second

	maxReaders = 64
)

// Validate says what is wrong with m, or nil.
func (m MemorySetting) Validate() error {
	switch {
	case m.Rate < Unbounded || m.Rate > maxSize:
		return fmt.Errorf("memory: rate of %d bytes a second", m.Rate)
	case m.WorkingSet < 0 || m.WorkingSet > maxSize:
		return fmt.Errorf("memory: working set of %d bytes", m.WorkingSet)
	case m.CheckRate < 0 || m.CheckRate > maxSize:
		return fmt.Errorf("memory: check rate of %d bytes a second", m.CheckRate)
	case m.Rate != 0 && m.WorkingSet < 4096:
		return errors.New("memory: a rate, but no working set")
	}
	switch m.Pattern {
	case Sequential, Random, Rewrite:
		return nil
	}
	return fmt.Errorf("memory: no such pattern: %q", m.Pattern)
}

// Validate says what is wrong with d, or nil.
func (d DiskSetting) Validate() error {
	if d.Rate < Unbounded {
		return fmt.Errorf("disk: rate of %d records a second", d.Rate)
	}
	if d.Readers < 0 || d.Readers > maxReaders {
		return fmt.Errorf("disk: %d readers: %d are the most", d.Readers, maxReaders)
	}
	return nil
}

// Validate says what is wrong with s, or nil.
func (s Settings) Validate() error {
	if err := errors.Join(s.Memory.Validate(), s.Disk.Validate()); err != nil {
		return err
	}
	switch {
	case s.Static < 0 || s.Static > maxSize:
		return fmt.Errorf("static set of %d bytes", s.Static)
	case s.Tick < MinTick || s.Tick > MaxTick:
		return fmt.Errorf("tick of %v: it may be %v to %v", s.Tick, MinTick, MaxTick)
	case s.Report < time.Second:
		return fmt.Errorf("report every %v: a second is the least", s.Report)
	case strings.ContainsAny(s.Device, " \t\n\""):
		return fmt.Errorf("device %q", s.Device)
	case s.Disk != DiskSetting{} && s.Device == "":
		return errors.New("disk: something to do, but no device")
	}
	return nil
}

// Cmdline returns s as words for the kernel's command line. ParseCmdline reads
// them.
func (s Settings) Cmdline() string {
	num := func(n int64) string {
		if n == Unbounded {
			return "max"
		}
		return strconv.FormatInt(n, 10)
	}
	words := []string{
		"lmctl.rate=" + num(s.Memory.Rate),
		"lmctl.set=" + num(s.Memory.WorkingSet),
		"lmctl.pattern=" + string(s.Memory.Pattern),
		"lmctl.checkrate=" + num(s.Memory.CheckRate),
		"lmctl.static=" + num(s.Static),
		"lmctl.seed=" + strconv.FormatUint(s.Seed, 10),
		"lmctl.tick=" + s.Tick.String(),
		"lmctl.report=" + s.Report.String(),
	}
	if s.Device != "" {
		words = append(words, "lmctl.disk="+s.Device, "lmctl.diskrate="+num(int64(s.Disk.Rate)),
			"lmctl.diskreaders="+strconv.Itoa(s.Disk.Readers))
	}
	for _, a := range s.Addresses {
		words = append(words, "lmctl.addr="+a.String())
	}
	for _, g := range s.Gateways {
		words = append(words, "lmctl.gw="+g.String())
	}
	return strings.Join(words, " ")
}

// ParseCmdline finds the settings in a kernel command line. What it does not
// say keeps its default; words that are not for the guest's init are left
// alone; the first word that cannot be understood is an error.
func ParseCmdline(line string) (Settings, error) {
	s := Defaults()
	for _, word := range strings.Fields(line) {
		key, value, _ := strings.Cut(word, "=")
		key, ours := strings.CutPrefix(key, "lmctl.")
		if !ours {
			continue
		}
		if err := s.set(key, value); err != nil {
			return Settings{}, fmt.Errorf("command line: %s: %w", word, err)
		}
	}
	if err := s.Validate(); err != nil {
		return Settings{}, fmt.Errorf("command line: %w", err)
	}
	return s, nil
}

func (s *Settings) set(key, value string) (err error) {
	switch key {
	case "rate":
		s.Memory.Rate, err = parseRate(value)
	case "set":
		s.Memory.WorkingSet, err = strconv.ParseInt(value, 10, 64)
	case "pattern":
		s.Memory.Pattern = Pattern(value)
	case "checkrate":
		s.Memory.CheckRate, err = strconv.ParseInt(value, 10, 64)
	case "static":
		s.Static, err = strconv.ParseInt(value, 10, 64)
	case "seed":
		s.Seed, err = strconv.ParseUint(value, 10, 64)
	case "tick":
		s.Tick, err = time.ParseDuration(value)
	case "report":
		s.Report, err = time.ParseDuration(value)
	case "disk":
		s.Device = value
	case "diskrate":
		var n int64
		n, err = parseRate(value)
		s.Disk.Rate = int(n)
	case "diskreaders":
		s.Disk.Readers, err = strconv.Atoi(value)
	case "addr":
		var p netip.Prefix
		if p, err = netip.ParsePrefix(value); err == nil {
			s.Addresses = append(s.Addresses, p)
		}
	case "gw":
		var a netip.Addr
		if a, err = netip.ParseAddr(value); err == nil {
			s.Gateways = append(s.Gateways, a)
		}
	default:
		err = errors.New("no such setting")
	}
	return err
}

func parseRate(value string) (int64, error) {
	if value == "max" {
		return Unbounded, nil
	}
	return strconv.ParseInt(value, 10, 64)
}
