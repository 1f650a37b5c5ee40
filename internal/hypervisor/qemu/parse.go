package qemu

import (
	"errors"
	"fmt"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

// maxDefinition bounds a definition's text in bytes: what comes from another
// host is not trusted to be short.
const maxDefinition = 256 << 10

// Problem is one thing that is wrong with a definition.
type Problem struct {
	Line, Column int    // from 1; 0 where the text has no place for it
	Field        string // such as disks[0].format
	Message      string // what is wrong and what to do
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Line > 0 {
		fmt.Fprintf(&b, "line %d, column %d: ", p.Line, p.Column)
	}
	if p.Field != "" {
		fmt.Fprintf(&b, "%s: ", p.Field)
	}
	b.WriteString(p.Message)
	return b.String()
}

// DefinitionError says everything that is wrong with a definition.
type DefinitionError struct{ Problems []Problem }

func (e *DefinitionError) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		lines[i] = p.String()
	}
	return "guest definition: " + strings.Join(lines, "\n")
}

// ParseDefinition reads and checks a definition. An unknown or doubled key and
// every bad value is a *DefinitionError with its place. What the author left
// out has its default in the result, a UUID and MACs among it.
func ParseDefinition(text []byte) (*Definition, error) {
	if len(text) > maxDefinition {
		return nil, problem(Problem{Message: fmt.Sprintf("it has %d bytes, more than the %d that are read", len(text), maxDefinition)})
	}
	file, err := parser.ParseBytes(text, 0)
	if err != nil {
		return nil, problem(yamlProblem(nil, err))
	}
	if len(file.Docs) != 1 || file.Docs[0].Body == nil {
		return nil, problem(Problem{Message: fmt.Sprintf("it must be one YAML document, here are %d", documents(file))})
	}
	var d Definition
	if err := yaml.UnmarshalWithOptions(text, &d, yaml.Strict()); err != nil {
		return nil, problem(yamlProblem(file, err))
	}
	v := validation{file: file}
	v.definition(&d)
	if len(v.problems) > 0 {
		return nil, &DefinitionError{Problems: v.problems}
	}
	d.complete()
	return &d, nil
}

func documents(file *ast.File) int {
	n := 0
	for _, doc := range file.Docs {
		if doc.Body != nil {
			n++
		}
	}
	return n
}

func problem(p Problem) error { return &DefinitionError{Problems: []Problem{p}} }

// yamlProblem finds place and field of an error of the YAML library.
func yamlProblem(file *ast.File, err error) Problem {
	var ye yaml.Error
	if !errors.As(err, &ye) {
		return Problem{Message: err.Error()}
	}
	p := Problem{Message: ye.GetMessage()}
	tok := ye.GetToken()
	if tok == nil || tok.Position == nil {
		return p
	}
	p.Line, p.Column = tok.Position.Line, tok.Position.Column
	if file != nil {
		p.Field = fieldAt(file, tok.Position)
	}
	var unknown *yaml.UnknownFieldError
	var typed *yaml.TypeError
	switch {
	case errors.As(err, &unknown):
		p.Field = ""
		p.Message += ": there is no such key here; look for a typing error"
	case errors.As(err, &typed):
		p.Message = fmt.Sprintf("%q is not %s", tok.Value, kindName(typed.DstType.Kind().String()))
	}
	return p
}

func kindName(kind string) string {
	switch kind {
	case "int", "int64", "uint64":
		return "a whole number"
	case "bool":
		return "true or false"
	case "slice":
		return "a list"
	case "struct":
		return "a group of keys"
	default:
		return "a text"
	}
}

// fieldAt names the field whose value stands at pos.
func fieldAt(file *ast.File, pos *token.Position) string {
	finder := &fieldFinder{pos: pos}
	for _, doc := range file.Docs {
		ast.Walk(finder, doc.Body)
	}
	return finder.field
}

type fieldFinder struct {
	pos   *token.Position
	field string
}

// Visit remembers the deepest node at the position.
func (f *fieldFinder) Visit(n ast.Node) ast.Visitor {
	t := n.GetToken()
	if t != nil && t.Position != nil && t.Position.Line == f.pos.Line && t.Position.Column == f.pos.Column {
		f.field = strings.TrimPrefix(strings.TrimPrefix(n.GetPath(), "$"), ".")
	}
	return f
}

// place finds where the value of a field stands in the text.
func place(file *ast.File, field string) (line, column int) {
	path, err := yaml.PathString("$." + field)
	if err != nil {
		return 0, 0
	}
	node, err := path.FilterFile(file)
	if err != nil || node.GetToken() == nil || node.GetToken().Position == nil {
		return 0, 0
	}
	pos := node.GetToken().Position
	return pos.Line, pos.Column
}
