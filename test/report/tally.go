package main

import (
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/lmctl/lmctl/internal/testenv"
)

// kinds are the values of testenv.AttrRan, in the order and the words of the
// closing line. Where CI=true, those with must have a test that ran or one that
// said that the machine cannot.
var kinds = []struct {
	value, words string
	must         string // how testenv calls what such tests need
}{
	{testenv.RanKVM, "on real KVM", "KVM"},
	{testenv.RanTCG, "under TCG", "TCG"},
	{testenv.RanTracker, "with dirty page tracking", "dirty page tracking"},
	{testenv.RanQEMU10, "with QEMU 10", ""},
	{testenv.RanLibvirt11, "with libvirt 11", ""},
}

// test is what the log says of one test.
type test struct {
	name   string // package and test
	over   string // pass, fail, skip, or "" of one that never ended
	parent bool   // has subtests
	fuzz   bool
	attrs  map[string][]string
	said   string   // the last line before the verdict
	told   []string // what it told of itself, a line each: errors, and what it logged
}

// tally counts a run.
type tally struct {
	tests  map[string]*test
	failed map[string]bool   // packages
	broken []string          // packages that failed without a test that did
	ends   map[string]string // package to the word with which its process ended
}

func tallyOf(r io.Reader) (*tally, error) {
	t := &tally{tests: make(map[string]*test), failed: make(map[string]bool), ends: make(map[string]string)}
	return t, readEvents(r, t.event, nil)
}

func (t *tally) event(e event) {
	if e.Action == "fail" {
		if e.Test == "" && e.Package != "" && !t.failed[e.Package] {
			t.broken = append(t.broken, e.Package)
		}
		t.failed[e.Package] = true
	}
	if e.Action == "output" && t.ends[e.Package] == "" && isEnd(e.Output) {
		t.ends[e.Package] = strings.TrimSpace(e.Output)
	}
	if e.Test == "" {
		return
	}
	x := t.get(e.Package, e.Test)
	switch e.Action {
	case "attr":
		x.attrs[e.Key] = append(x.attrs[e.Key], e.Value)
	case "pass", "fail", "skip":
		x.over = e.Action
	case "output":
		line := strings.TrimSpace(e.Output)
		if line != "" && !strings.HasPrefix(line, "=== ") && !strings.HasPrefix(line, "--- ") {
			x.said = line
		}
		if position.MatchString(line) {
			x.told = append(x.told, line)
		}
	}
}

// isEnd finds the line that says why a test's process did not get to its end.
func isEnd(line string) bool {
	for _, prefix := range []string{"panic: ", "fatal error: ", "WARNING: DATA RACE", "signal: ", "*** Test killed"} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return false
}

func (t *tally) get(pkg, name string) *test {
	key := pkg + "." + name
	x := t.tests[key]
	if x != nil {
		return x
	}
	x = &test{name: key, fuzz: strings.HasPrefix(name, "Fuzz"), attrs: make(map[string][]string)}
	t.tests[key] = x
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		t.get(pkg, name[:i]).parent = true
	}
	return x
}

// skipped returns the tests that were skipped, sorted by name. Not among them
// are inputs that a fuzz test has no use for.
func (t *tally) skipped() []*test {
	var list []*test
	for _, name := range slices.Sorted(maps.Keys(t.tests)) {
		if x := t.tests[name]; x.over == "skip" && !(x.fuzz && strings.Contains(name, "/")) {
			list = append(list, x)
		}
	}
	return list
}

var position = regexp.MustCompile(`^[A-Za-z0-9_.-]+\.go:[0-9]+: `)

// reason is why a test was skipped, in its own words.
func (x *test) reason() string {
	if said := position.ReplaceAllString(x.said, ""); said != "" {
		return said
	}
	return "no reason given"
}

// cause is the reason in a word or two, to count by.
func (x *test) cause() string {
	if lacks := x.attrs[testenv.AttrLacks]; len(lacks) > 0 {
		return "machine lacks " + lacks[0]
	}
	if missing := x.attrs[testenv.AttrMissing]; len(missing) > 0 {
		return "missing " + missing[0]
	}
	return x.reason()
}

func (t *tally) skipLines() []string {
	var lines []string
	for _, x := range t.skipped() {
		lines = append(lines, fmt.Sprintf("skipped: %s: %s", x.name, x.reason()))
	}
	return lines
}

// How much of a test that failed the end of a run repeats.
const (
	mostTold   = 12
	longestOne = 400 // bytes
)

// failLines say what failed, and repeat what it told of itself: the end of a
// long log is all that some have of it.
func (t *tally) failLines() []string {
	var lines []string
	for _, name := range slices.Sorted(maps.Keys(t.tests)) {
		x := t.tests[name]
		verdict := map[string]string{"fail": "failed", "": "never ended"}[x.over]
		if verdict == "" || x.parent && len(x.told) == 0 {
			continue
		}
		lines = append(lines, verdict+": "+x.name)
		if over := len(x.told) - mostTold; over > 0 {
			lines = append(lines, fmt.Sprintf("    (%d lines above)", over))
		}
		for _, told := range x.told[max(0, len(x.told)-mostTold):] {
			lines = append(lines, "    "+told[:min(len(told), longestOne)])
		}
	}
	for _, name := range t.broken {
		if end := t.ends[name]; end != "" {
			name += ": " + end
		}
		lines = append(lines, "failed as a whole: "+name)
	}
	return lines
}

// count returns how many tests, without those that only hold subtests, ended
// in a way.
func (t *tally) count(over string) int {
	n := 0
	for _, x := range t.tests {
		if x.over == over && !x.parent {
			n++
		}
	}
	return n
}

// ran returns how many tests ran on something.
func (t *tally) ran(kind string) int {
	n := 0
	for _, x := range t.tests {
		if x.over != "skip" && slices.Contains(x.attrs[testenv.AttrRan], kind) {
			n++
		}
	}
	return n
}

// line is the last of a run.
func (t *tally) line() string {
	var b strings.Builder
	fmt.Fprintf(&b, "tests: %d passed, %d failed", t.count("pass"), t.count("fail"))
	if n := t.count(""); n > 0 {
		fmt.Fprintf(&b, ", %d never ended", n)
	}
	if n := len(t.broken); n > 0 {
		fmt.Fprintf(&b, ", %d package(s) failed as a whole", n)
	}
	for i, k := range kinds {
		fmt.Fprintf(&b, "%s%d %s", []string{"; ", ", "}[min(i, 1)], t.ran(k.value), k.words)
	}
	causes := make(map[string]int)
	for _, x := range t.skipped() {
		causes[x.cause()]++
	}
	fmt.Fprintf(&b, "; %d skipped", len(t.skipped()))
	for i, cause := range slices.Sorted(maps.Keys(causes)) {
		fmt.Fprintf(&b, "%s%s (%d)", []string{": ", ", "}[min(i, 1)], cause, causes[cause])
	}
	return b.String()
}

// objections are why a CI run must not pass, whatever the tests' own verdict.
func (t *tally) objections() []string {
	var lines []string
	lacks := make(map[string]bool)
	for _, x := range t.skipped() {
		if what := x.attrs[testenv.AttrLacks]; len(what) > 0 {
			lacks[what[0]] = true
			continue
		}
		lines = append(lines, fmt.Sprintf("not allowed in CI: %s was skipped for what the machine could have: %s", x.name, x.reason()))
	}
	for _, k := range kinds {
		if k.must != "" && t.ran(k.value) == 0 && !lacks[k.must] {
			lines = append(lines, fmt.Sprintf("not allowed in CI: no test ran %s, and none says that the machine cannot", k.words))
		}
	}
	return lines
}
