package sys

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// Mapping is one line of /proc/PID/maps.
type Mapping struct {
	Start, End         uint64 // bytes
	Read, Write, Exec  bool
	Shared             bool
	Offset             uint64 // of Start in the file, bytes
	DevMajor, DevMinor uint32
	Inode              uint64 // zero: no file
	Path               string // file, or a name like [vdso]; may be empty
	Deleted            bool   // the file has no name any more
}

// Maps lists the mappings of a process in the order of their addresses.
func Maps(pid int) ([]Mapping, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m, err := ParseMaps(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return m, nil
}

// ParseMaps reads the format of /proc/PID/maps, proc_pid_maps(5).
func ParseMaps(r io.Reader) ([]Mapping, error) {
	var maps []Mapping
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		m, err := parseMapping(s.Text())
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		maps = append(maps, m)
	}
	return maps, s.Err()
}

func parseMapping(line string) (Mapping, error) {
	var m Mapping
	addr, rest, _ := strings.Cut(line, " ")
	perms, rest, _ := strings.Cut(rest, " ")
	offset, rest, _ := strings.Cut(rest, " ")
	dev, rest, _ := strings.Cut(rest, " ")
	inode, path, _ := strings.Cut(rest, " ")

	start, end, _ := strings.Cut(addr, "-")
	major, minor, _ := strings.Cut(dev, ":")
	var errs [6]error
	m.Start, errs[0] = strconv.ParseUint(start, 16, 64)
	m.End, errs[1] = strconv.ParseUint(end, 16, 64)
	m.Offset, errs[2] = strconv.ParseUint(offset, 16, 64)
	maj, err := strconv.ParseUint(major, 16, 32)
	errs[3] = err
	mnr, err := strconv.ParseUint(minor, 16, 32)
	errs[4] = err
	m.Inode, errs[5] = strconv.ParseUint(inode, 10, 64)
	if err := errors.Join(errs[:]...); err != nil {
		return Mapping{}, fmt.Errorf("%q: %w", line, err)
	}
	if len(perms) != 4 || m.End < m.Start {
		return Mapping{}, fmt.Errorf("%q: no mapping", line)
	}
	m.DevMajor, m.DevMinor = uint32(maj), uint32(mnr)
	m.Read, m.Write, m.Exec, m.Shared = perms[0] == 'r', perms[1] == 'w', perms[2] == 'x', perms[3] == 's'
	// The kernel pads with blanks up to the name, and writes a line feed in a
	// name as \012. A name itself may begin with a slash or a bracket only.
	m.Path = strings.ReplaceAll(strings.TrimLeft(path, " "), `\012`, "\n")
	m.Path, m.Deleted = strings.CutSuffix(m.Path, " (deleted)")
	return m, nil
}

// StartTime returns when a process started, in clock ticks since boot: with
// its PID it names a process for good. From proc_pid_stat(5), field 22.
func StartTime(pid int) (uint64, error) {
	path := fmt.Sprintf("/proc/%d/stat", pid)
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	t, err := parseStartTime(string(b))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

func parseStartTime(stat string) (uint64, error) {
	// Field 2, the command, is in parentheses and may hold blanks and
	// parentheses itself.
	i := strings.LastIndexByte(stat, ')')
	if i < 0 {
		return 0, fmt.Errorf("%q: no command", stat)
	}
	f := strings.Fields(stat[i+1:]) // from field 3
	if len(f) < 20 {
		return 0, fmt.Errorf("%q: too few fields", stat)
	}
	return strconv.ParseUint(f[19], 10, 64)
}

// Status returns one field of /proc/PID/status (or of a thread's), as
// "TracerPid", without the blanks around it; ok says whether the kernel has it.
func Status(pid int, field string) (value string, ok bool, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return "", false, err
	}
	for line := range strings.Lines(string(b)) {
		if name, v, found := strings.Cut(line, ":"); found && name == field {
			return strings.TrimSpace(v), true, nil
		}
	}
	return "", false, nil
}
