package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
)

// event is a line of go test -json; see go doc test2json.
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Output     string
	Key, Value string
}

// readEvents calls f for each event, and other, unless it is nil, for each line
// that is none.
func readEvents(r io.Reader, f func(event), other func(line []byte)) error {
	in := bufio.NewReader(r)
	for {
		line, err := in.ReadBytes('\n')
		var e event
		switch {
		case len(line) == 0:
		case json.Unmarshal(line, &e) == nil && e.Action != "":
			f(e)
		case other != nil:
			other(line)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// renderer turns events back into what go test prints for several packages
// without -v: a line for each that passes, and for one that fails what its
// failing tests said.
type renderer struct {
	w        io.Writer
	err      error
	packages map[string]*packageOutput
	failed   bool
}

type packageOutput struct {
	lines []event
	over  map[string]string // test to its last action: pass, fail or skip
}

func render(w io.Writer, r io.Reader) error {
	rd := &renderer{w: w, packages: make(map[string]*packageOutput)}
	err := readEvents(r, rd.event, func(line []byte) { rd.print(string(bytes.TrimRight(line, "\n")) + "\n") })
	if rd.failed {
		rd.print("FAIL\n")
	}
	return errors.Join(err, rd.err)
}

func (rd *renderer) print(s string) {
	if rd.err == nil {
		_, rd.err = io.WriteString(rd.w, s)
	}
}

func (rd *renderer) event(e event) {
	if e.Action == "build-output" {
		rd.print(e.Output)
		return
	}
	if e.Package == "" {
		return
	}
	p := rd.packages[e.Package]
	if p == nil {
		p = &packageOutput{over: make(map[string]string)}
		rd.packages[e.Package] = p
	}
	switch e.Action {
	case "output":
		p.lines = append(p.lines, e)
	case "pass", "fail", "skip":
		if e.Test != "" {
			p.over[e.Test] = e.Action
			return
		}
		rd.end(p, e.Action)
		delete(rd.packages, e.Package)
	}
}

// end prints what a package has to say.
func (rd *renderer) end(p *packageOutput, action string) {
	rd.failed = rd.failed || action == "fail"
	for _, e := range p.lines {
		if action == "fail" && p.shown(e) || action != "fail" && isVerdict(e) {
			rd.print(e.Output)
		}
	}
}

// shown says whether a line of a package that failed is of use: it is not of a
// test that passed, and is not there only for -v.
func (p *packageOutput) shown(e event) bool {
	if over := p.over[e.Test]; e.Test != "" && (over == "pass" || over == "skip") {
		return false
	}
	for _, prefix := range []string{"=== RUN ", "=== PAUSE ", "=== CONT ", "=== NAME ", "=== ATTR "} {
		if strings.HasPrefix(e.Output, prefix) {
			return false
		}
	}
	return true
}

// isVerdict finds the line about a package that passed or has no tests.
func isVerdict(e event) bool {
	return e.Test == "" && (strings.HasPrefix(e.Output, "ok  \t") || strings.HasPrefix(e.Output, "?   \t"))
}
