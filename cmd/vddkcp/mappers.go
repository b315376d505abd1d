package main

import (
	"errors"
	"fmt"
	"reflect"

	"github.com/alecthomas/kong"
)

// textMappers make kong use the words of the command line unchanged. kong's own mappers of
// strings and paths convert words to JSON and back. The conversion replaces bytes that are
// not UTF-8, and takes longer than the rest of parsing.
var textMappers = []kong.Option{
	kong.KindMapper(reflect.String, kong.MapperFunc(decodeString)),
	kong.NamedMapper("path", kong.MapperFunc(decodePath)),
}

func decodeString(ctx *kong.DecodeContext, target reflect.Value) error {
	token, err := ctx.Scan.PopValue("string")
	if err != nil {
		return err
	}
	target.SetString(fmt.Sprint(token.Value))
	return nil
}

// decodePath stores a path from the command line in the field of a flag. If the flag can be
// repeated, decodePath appends the path to those in the field. Like kong's own mapper, it
// makes the path absolute and replaces a leading ~ by the home folder.
func decodePath(ctx *kong.DecodeContext, target reflect.Value) error {
	token := ctx.Scan.Pop()
	if token.IsEOL() {
		return errors.New("the value is missing: want a path")
	}
	path := fmt.Sprint(token.Value)
	if path != "-" {
		path = kong.ExpandPath(path)
	}
	if target.Kind() == reflect.Slice {
		target.Set(reflect.Append(target, reflect.ValueOf(path)))
		return nil
	}
	target.SetString(path)
	return nil
}
