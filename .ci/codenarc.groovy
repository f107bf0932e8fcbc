// Rules against errors; style is left to review.
ruleset {
    ruleset('rulesets/basic.xml') {
        EmptyMethod { doNotApplyToClassNames = 'ProgressLogger' }   // for a subclass to fill
    }
    ruleset('rulesets/exceptions.xml') {
        exclude 'ThrowException'
        exclude 'CatchException'   // QuPath's readers throw anything
    }
    ruleset('rulesets/imports.xml') {
        exclude 'MisorderedStaticImports'
    }
    ruleset('rulesets/unused.xml') {
        UnusedVariable { ignoreVariableNames = '_' }
    }
    ruleset('rulesets/groovyism.xml') {
        exclude 'ExplicitHashSetInstantiation'
    }
    LineLength { length = 120 }
    TrailingWhitespace
    NoTabCharacter
}
